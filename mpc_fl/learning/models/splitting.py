"""A network cut in two where training begins: what stands before the first trained layer, and the rest.

The former is the same in every step of a run, so what it makes of a record need be computed once.
"""

from __future__ import annotations

import copy

from torch import fx, nn

from mpc_fl.errors import ModelError
from mpc_fl.learning.models.parameters import trainable_parameters
from mpc_fl.learning.models.rewriting import tidied, without_in_place


def split_before_trained(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """What stands before the first trained layer, and the rest, whose one input is the value of the former.

    Both are copies in evaluation mode, without in-place operations. Trained parameters are all in the rest, with their names and in
    their order. The cut lies as late as one value alone crosses it. None where nothing stands before it, where no such cut is, or
    where the network cannot be traced.
    """
    try:
        traced = without_in_place(copy.deepcopy(model).eval())
    except ModelError:
        return None
    modules, nodes = dict(traced.named_modules()), list(traced.graph.nodes)
    trained = [name for name, _ in trainable_parameters(model)]

    def is_trained(node: fx.Node) -> bool:
        if node.op == "get_attr":
            return node.target in trained
        return node.op == "call_module" and any(p.requires_grad for p in modules[str(node.target)].parameters())

    first = next((place for place, node in enumerate(nodes) if is_trained(node)), 0)
    for cut in range(first, 1, -1):
        before = set(nodes[:cut])
        crossing = [node for node in nodes[:cut] if any(user not in before for user in node.users)]
        if len(crossing) == 1 and crossing[0].op != "placeholder":
            rest = _beginning_after(traced, crossing[0].name)
            if rest is not None and [name for name, _ in trainable_parameters(rest)] == trained:
                return _ending_at(traced, crossing[0].name), rest
    return None


def _named(graph: fx.Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if node.name == name)


def _ending_at(traced: fx.GraphModule, name: str) -> fx.GraphModule:
    front = copy.deepcopy(traced)
    _named(front.graph, "output").args = (_named(front.graph, name),)
    front.graph.eliminate_dead_code()
    return tidied(front).requires_grad_(False)


def _beginning_after(traced: fx.GraphModule, name: str) -> fx.GraphModule | None:
    """What follows from that value alone; None where something follows from the inputs besides."""
    rest = copy.deepcopy(traced)
    given = _named(rest.graph, name)
    inputs = [node for node in rest.graph.nodes if node.op == "placeholder"]
    with rest.graph.inserting_before(given):
        value = rest.graph.placeholder("value")
    given.replace_all_uses_with(value)
    rest.graph.eliminate_dead_code()
    if any(node.users for node in inputs):
        return None
    for node in inputs:
        rest.graph.erase_node(node)
    rest.graph.eliminate_dead_code()
    return tidied(rest)
