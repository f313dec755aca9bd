"""Other engines that run converted models: what each can express."""
