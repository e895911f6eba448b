import jax.numpy as jnp
import pytest

from lora_jax import partition
from lora_jax.errors import UserError

TREE = {
    "embed": {"embedding": jnp.ones((5, 3))},
    "layers[2:5]": {"mlp": {"kernel": jnp.ones((3, 2, 4))}},
}


def test_expand_and_stack():
    assert partition.expand("layers[2:5]/mlp/kernel") == [
        f"layers/{i}/mlp/kernel" for i in (2, 3, 4)
    ]
    assert partition.expand("embed/embedding") == ["embed/embedding"]
    assert partition.stack_of("layers[2:5]/mlp/kernel") == (2, 5)
    assert partition.stack_name("layers[2:5]/mlp/kernel") == "layers"


def test_split_and_combine_are_inverse():
    frozen, taken = partition.split(TREE, lambda path, _: "embed" in path)
    assert set(taken) == {"embed/embedding"}
    assert isinstance(frozen["embed"]["embedding"], partition.Hole)
    with pytest.raises(UserError, match="holes"):
        partition.combine(frozen, {})
    assert partition.combine(frozen, taken)["embed"]["embedding"] is TREE["embed"]["embedding"]


def test_first_rule_wins_and_unmatched_rules_teach():
    rules = partition.Rules.of(((r"layers/3/", 1), (r"layers", 2)))
    assert [rules.get(p) for p in partition.expand("layers[2:5]/mlp/kernel")] == [2, 1, 2]
    with pytest.raises(UserError, match="did you mean layers/2/mlp"):
        rules = partition.Rules.of(((r"layers/9/mlp$", 1),))
        rules.check(partition.expand("layers[2:5]/mlp/kernel"), "rank")
    with pytest.raises(UserError, match="not a regular expression"):
        partition.Rules.of((("(", 1),))


def test_split_stacks():
    cut = partition.split_stacks(TREE, {"layers": [3]})
    assert {k: v["mlp"]["kernel"].shape[0] for k, v in cut.items() if "[" in k} == {
        "layers[2:3]": 1,
        "layers[3:5]": 2,
    }
