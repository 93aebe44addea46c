from pydistill.cli import main

main()
