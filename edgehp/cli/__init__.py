"""The command line: one module a command, each of which parses, calls and prints.

What a command runs is imported in its function: `edgehp COMMAND --help` must not pay for OpenCV and
the engines.
"""
