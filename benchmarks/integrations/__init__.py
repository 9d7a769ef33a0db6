"""What works together with what: integrations of the Hugging Face ecosystem on small models of many architectures."""
