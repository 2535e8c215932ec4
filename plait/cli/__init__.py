"""The command line, one thin module per command. Each imports what it needs when it runs, so that `--help` is quick."""

from plait.cli.app import main as main
