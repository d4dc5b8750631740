"""The command line `peft-kernels`: one file or folder per command."""
