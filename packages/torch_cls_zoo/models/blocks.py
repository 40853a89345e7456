"""The blocks of a network's body, from the images to the head."""

from __future__ import annotations

from torch import nn

from shared_core.for_torch.networks import head_names


def body_blocks(model: nn.Module, num_classes: int) -> list[list[nn.Parameter]]:
    """The learning parameters of each block: a child of the network, or of a sequence of blocks.

    Args:
        num_classes: outputs of the head, which is left out.
    """
    head = {
        id(parameter)
        for name in head_names(model, num_classes)
        for parameter in model.get_submodule(name).parameters()
    }
    blocks: list[list[nn.Parameter]] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.Sequential | nn.ModuleList):
                walk(child)
            elif found := [p for p in child.parameters() if p.requires_grad and id(p) not in head]:
                blocks.append(found)

    walk(model)
    own = [p for p in model.parameters(recurse=False) if p.requires_grad]  # tokens, positions
    return [own, *blocks] if own else blocks
