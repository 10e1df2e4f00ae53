"""A model that is larger than memory: a layer has its weights while it computes, and no longer.

What lies outside the layers, such as the embedding, has its weights all the time. The model itself is made on `meta`, where
nothing is allocated. It computes the same numbers, by the same kernels; it only reads each layer anew for every batch.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.layers.parameter import ShardedParameter
from megatron_core_impl.layers.rope import frequencies
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.parallelize import Reader, read_rows

Make = Callable[[str, nn.Parameter], Tensor]  # name of a parameter in its model, the parameter → its values


@torch.no_grad()
def load_on_demand(model: nn.Module, layers: Iterable[nn.Module], make: Make) -> None:
    """Give a model on `meta` its weights: to each of the layers while it computes, to the rest now.

    Args:
        model: its parameters are on `meta`; its buffers are not.
        layers: parts of it, none within another, that share no parameter.
        make: the values of a parameter, on the device that computes.
    """
    layers = list(layers)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    made: dict[int, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for leaf, parameter in _own_parameters(module):
            key = id(parameter)
            if key in of_layers:
                continue
            if key not in made:
                made[key] = _with_values(parameter, make(names[key], parameter))
            module._parameters[leaf] = made[key]
    for layer in layers:
        _load_while_it_computes(layer, names, make)


def _load_while_it_computes(layer: nn.Module, names: dict[int, str], make: Make) -> None:
    places = [(module, leaf, parameter) for module in layer.modules() for leaf, parameter in _own_parameters(module)]

    def load(_module: nn.Module, _arguments: object) -> None:
        for module, leaf, parameter in places:
            module._parameters[leaf] = _with_values(parameter, make(names[id(parameter)], parameter))

    def unload(_module: nn.Module, _arguments: object, _output: object) -> None:
        for module, leaf, parameter in places:
            module._parameters[leaf] = parameter

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(unload)


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(leaf, parameter) for leaf, parameter in module._parameters.items() if parameter is not None]


def _with_values(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter of the same kind, with the same attributes, and with values."""
    made = type(parameter)(values, requires_grad=False)
    made.__dict__.update(parameter.__dict__)
    return made


def streamed_transformer(config: ModelConfig, mesh: Mesh, *, dtype: torch.dtype, reader: Reader) -> Transformer:
    """This rank's part of a model, which reads its layers while it computes.

    Raises:
        ValueError: the layout cannot hold the model, or a tensor has another shape. So it does while it computes.
    """
    model = Transformer(config, mesh, dtype=dtype, device="meta")
    model.speeds = frequencies(config, dtype).to(mesh.device)

    def make(_name: str, parameter: nn.Parameter) -> Tensor:
        assert isinstance(parameter, ShardedParameter)
        values = torch.empty(parameter.shape, dtype=dtype, device=mesh.device)
        read_rows(reader, parameter.spec.name, parameter.spec.shape, parameter.piece, into=values)
        return values

    load_on_demand(model, model.model.layers.values(), make)
    return model
