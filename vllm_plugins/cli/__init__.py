"""The ``vllm-plugins`` command; one module per subcommand, imported when it is called."""
