"""Commands beside serve, chat and run: `HELP`, `add_arguments(parser)`, `run(options)`; light at the top.

One a file; what a command needs beside that is in files that begin with its name.
"""
