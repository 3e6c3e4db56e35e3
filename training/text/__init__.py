"""Language modelling on plain text: files or `datasets` sources, streamed and packed into rows."""
