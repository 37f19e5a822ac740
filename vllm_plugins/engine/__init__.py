"""Engine plumbing shared by the plug-ins: the only code that knows vLLM's internals."""
