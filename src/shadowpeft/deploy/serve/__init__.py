"""An OpenAI-compatible server whose requests are decoded together, whatever their adapters and modes."""

__all__: list[str] = []
