"""The implementations: `kernels/<backend>/<op>.py`, chosen by `peft_kernels.dispatch`."""
