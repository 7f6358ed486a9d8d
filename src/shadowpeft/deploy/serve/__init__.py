"""An OpenAI-compatible server whose requests are decoded together, whatever their adapters and modes."""
