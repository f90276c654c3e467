"""Commands beside serve, chat and run, one a file: `HELP`, `add_arguments(parser)`, `run(options)`; light at the top."""
