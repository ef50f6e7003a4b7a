"""The subcommands of `foldserve`: on files here, and against a running service."""
