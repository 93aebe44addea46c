"""What pydistill is timed against: each peer turns a `Problem` into a thunk that returns `(loss, d_images, d_lr)`."""
