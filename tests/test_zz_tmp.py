from tests.test_per_example import *

@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data")], ids=["whole", "spread"])
@pytest.mark.parametrize("way", ["ghost", "ghost, 2 at a time", "microbatch of 2"])
@pytest.mark.parametrize("keep", [False, True])
def test_weights_explicit(way, spec, keep):
    loss, params, batch, _ = plain()
    batch = jnp.concatenate([batch, batch[:1]])
    weights = jnp.array([1.0, 0, 2, 1, 0, 1])
    step = jax.jit(oc.clipped_value_and_grad(loss, 0.5, keep_batch_dim=keep, **WAYS[way]))
    want = step(params, batch, weights=weights)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        whole = jax.device_put(params, PartitionSpec())
        got = step(whole, jax.device_put(batch, PartitionSpec("data")), weights=jax.device_put(weights, spec))
    assert_close(jax.device_get(got), want)
