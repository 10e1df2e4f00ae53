"""How others store the canonical tensors of a model: names, what is fused, the order of rows. No torch in here.

A `Form` is data: a family has one for Hugging Face, and there is one each for the checkpoints of Meta and of Megatron-LLM. From
a form follows the table (`StackedTensor`s) by which everything is read and written, convert, import and export alike. Which
tensors there are, which of them are made of heads and which heads are rotated, says `models.tensors` alone.

Other systems cut tensors over tensor parallel ranks first and fuse each rank's parts afterwards. So a rank's table is the same
form, of the parts that our own arithmetic gives that rank: per rank [up; gate], per rank q, k and v of whole groups of heads.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_core_impl.checkpoint.slicing import chunk_layers, is_on_pp_rank, replica, shape_of, tp_slice
from megatron_core_impl.config import Layout, ModelConfig, RankForm, Rows, StackedTensor, TensorSpec
from megatron_core_impl.models.tensors import tensors


@dataclass(frozen=True)
class Form:
    """How a kind of checkpoint stores the canonical tensors. The default is: as they are."""

    # A canonical name, or a part of one between dots -> theirs; "" drops the part
    words: Mapping[str, str] = field(default_factory=dict)
    # Their module -> the canonical ones whose rows it holds, one below the other; those made of heads by key/value head:
    # the query heads that look at the first, its key head, its value head, and so on
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # The two numbers of a rotated pair lie side by side in a head, not half a head apart
    is_interleaved: bool = False

    def name(self, name: str) -> str:
        """Their name of a module or tensor with a canonical one."""
        if name in self.words:
            return self.words[name]
        return ".".join(word for part in name.split(".") if (word := self.words.get(part, part)))

    def table(self, specs: Iterable[TensorSpec], first_layer: int = 0) -> list[StackedTensor]:
        """Their tensors, made of these canonical ones.

        Args:
            specs: whole tensors, or the parts that a rank holds, with the parts' shapes.
            first_layer: the layer that they number 0.
        """
        by_name = {spec.name: spec for spec in specs}
        fused_as = {member: (module, members) for module, members in self.fused.items() for member in members}
        table = {}
        for spec in by_name.values():
            module, _, kind = spec.name.rpartition(".")  # kind: weight or bias
            stem, _, last = module.rpartition(".")
            theirs, members = fused_as.get(last, (last, (last,)))
            name = self.name(_renumbered(f"{stem}.{theirs}.{kind}".removeprefix("."), spec, first_layer))
            if name not in table:
                parts = [by_name[member] for m in members if (member := f"{stem}.{m}.{kind}".removeprefix(".")) in by_name]
                table[name] = StackedTensor(name, tuple(self._stack(parts)))
        return list(table.values())

    def _stack(self, parts: Sequence[TensorSpec]) -> Iterable[Rows]:
        # Parts made of heads come in as many groups as there are key/value heads, the fewest heads of all
        groups = min(spec.shape[0] // spec.heads.head_dim if spec.heads else 1 for spec in parts) if len(parts) > 1 else 1
        for group in range(groups):
            for spec in parts:
                rows = spec.shape[0] // groups
                is_turned = self.is_interleaved and spec.heads is not None and spec.heads.is_rotated
                halves = (2, spec.heads.head_dim // 2) if is_turned and spec.heads else None
                yield Rows(spec.name, group * rows, (group + 1) * rows, halves)


def rank_form(form: Form, specs: Sequence[TensorSpec], layout: Layout, pp_rank: int, tp_rank: int, chunk: int = 0) -> RankForm:
    """What a rank stores in a form: of one of its chunks of layers, where it holds several (vpp).

    Args:
        specs: the tensors of the model, with a vocabulary that needs no padding (`evenly_cut`).
    """
    num_layers = 1 + max(spec.layer for spec in specs)
    # Each chunk is a pp stage of its own: the first holds the embedding, the last the output layer
    stages, stage = Layout(tp=layout.tp, pp=layout.pp * layout.vpp), chunk * layout.pp + pp_rank
    ((first_layer, _),) = chunk_layers(num_layers, stages, stage)
    held = [spec for spec in specs if is_on_pp_rank(spec, num_layers, stages, stage)]
    pieces = {spec.name: tp_slice(spec, layout.tp, tp_rank) for spec in held}
    table = form.table([replace(spec, shape=shape_of(pieces[spec.name])) for spec in held], first_layer)
    return RankForm(pieces, tuple(table), frozenset(spec.name for spec in held if replica(spec, stages, stage, tp_rank) == 0))


def evenly_cut(config: ModelConfig, rows: int) -> list[TensorSpec]:
    """The tensors of a model whose vocabulary others have padded to `rows`, and cut as any other tensor."""
    return [replace(spec, padded=False) for spec in tensors(replace(config, vocab_size=rows))]


def _renumbered(name: str, spec: TensorSpec, first_layer: int) -> str:
    if spec.place != "layer":
        return name
    return name.replace(f".{spec.layer}.", f".{spec.layer - first_layer}.", 1)
