"""The README.md that travels with an adapter."""

from pathlib import Path
from typing import Any

from shadowpeft.core import ShadowNetwork
from shadowpeft.model.bases import is_hub_name


def model_card(described: dict[str, Any], network: ShadowNetwork) -> str:
    """A model card in the hub's format: what the adapter is, for which base, how to use it."""
    base, shadow = described["base"], described["shadow"]
    name = base["name_or_path"] or ""
    task = "text-classification" if base["num_labels"] else "text-generation"
    header = ["---", "library_name: shadowpeft", f"pipeline_tag: {task}", "tags:", "- shadowpeft", "- adapter"]
    is_on_hub = is_hub_name(name)
    if is_on_hub:  # the hub refuses a card that names another thing here
        header += [f"base_model: {name}", "base_model_relation: adapter"]
    trained = network.num_parameters()
    shown = name if is_on_hub else Path(name).name or "(not named)"
    return "\n".join(
        [
            *header,
            "---",
            "",
            f"# ShadowPEFT adapter for {shown}",
            "",
            f"A shadow network ({trained:,} parameters) for the frozen `{base['architecture']}` base, "
            f"{base['num_blocks']} blocks of width {base['hidden_size']}. Method: ShadowPEFT, arXiv 2604.19254.",
            "",
            "```python",
            "from shadowpeft import ShadowModel",
            "",
            'model = ShadowModel.from_pretrained("PATH_OR_NAME_OF_THIS_ADAPTER")  # attached to its base',
            "shadow = model.detach()  # the stand-alone shadow, an ordinary transformers model",
            "```",
            "",
            "| setting | value |",
            "|---|---|",
            *[f"| {key} | {value} |" for key, value in sorted(shadow.items()) if value is not None],
            "",
            f"Written by shadowpeft {described['library_version']}.",
            "",
        ]
    )
