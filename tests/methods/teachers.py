"""How the teacher of the decoupled methods is squeezed, and a set distilled from it."""

from pydistill.methods.decoupled.recover import merge, real_images, recover
from pydistill.methods.decoupled.squeeze import Squeeze

SQUEEZE = Squeeze(network="convnet", width=6, depth=2, epochs=3, batch_size=10, lr=0.05, crop=0.8, flip=0.0)


def make(config, teachers, folder, data, **options):
    real = real_images(config, data, teachers) if config.starts_real else None
    recover(config, teachers, folder, real=real, checkpoint_every=2, **options)
    return merge(config, teachers, folder)
