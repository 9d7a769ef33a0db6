"""Numbers to bits and back; nothing here knows of operators."""
