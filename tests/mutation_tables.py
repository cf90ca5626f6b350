"""What `tests.mutation` runs in each room, and which of its mistakes change nothing."""

# For each room the tests that see its mistakes soonest, after the examples of the file itself.
PARTS = "tests/test_parts.py"
CONTRACT = "tests/test_contract.py::test_"
FIDELITY = "tests/test_fidelity.py::test_"
EXAMPLES = "tests/test_per_example.py::test_"
LEARNING = "tests/test_learning.py::test_"
PRIVATE = "tests/test_private.py::test_"
BUILDING = "tests/test_building.py::test_"
TESTS = {
    "core.py": [
        PARTS,
        CONTRACT + "unknown_parts_are_rejected",
        CONTRACT + "a_norm_or_factor_outside_the_normal_floats_counts_as_not_finite",
        CONTRACT + "a_bound_of_zero_or_less_and_gradients_of_zero_give_zeros",
    ],
    "engine.py": [
        FIDELITY + "clippy_and_larc_follow_the_paper",
        "optaxclip/core.py",
        PARTS,
        CONTRACT + "update_without_a_state",
        CONTRACT + "missing_parameters_are_asked_for",
        CONTRACT + "the_state_of_another_scope_is_named",
    ],
    "states.py": [
        CONTRACT + "update_without_a_state",
        CONTRACT + "the_state_of_another_scope_is_named",
        CONTRACT + "a_foreign_state_is_named",
        CONTRACT + "a_state_may_have_another_type_with_the_same_fields",
        BUILDING + "map_params_before_init_works_or_says_what_to_call",
        BUILDING + "unfiltered_models_work_or_the_error_names_the_filter",
        BUILDING + "the_state_of_another_transformation_is_rejected",
        BUILDING + "the_error_names_the_owner_of_a_foreign_state",
        BUILDING + "a_missing_state_is_rejected_where_there_is_a_history",
    ],
    "norms.py": [PARTS, "tests/test_global_norm.py"],
    "actions.py": [PARTS],
    "feeds.py": [PARTS],
    "scopes/": [PARTS, "tests/test_stacked.py"],
    "thresholds/by_name.py": ["tests/test_by_name.py", "tests/test_stacked.py"],
    "thresholds/": [
        PARTS,
        LEARNING + "bad_numbers_are_rejected_by_name",
        FIDELITY + "variants_follow_their_rule",
        FIDELITY + "norm_ratio_is_olmos_rule_by_leaf_and_for_the_whole",
        FIDELITY + "skip_spikes_matches_olmos_code",
        FIDELITY + "norms_follow_the_paper",
        "tests/test_advice.py::test_a_transformation_of_gradients_is_not_a_threshold",
    ],
    "wrappers/": ["tests/test_skipping.py", PARTS],
    "per_example/users.py": [
        PRIVATE + "a_user_is_clipped_as_one",
        PRIVATE + "grouping_by_user_matches_a_loop",
        PRIVATE + "invalid_users_are_rejected",
        PRIVATE + "a_nonfinite_example_drops_its_user_and_no_other",
        EXAMPLES + "the_loss_of_a_user_is_that_of_the_examples_that_are_there",
    ],
    "per_example/private_quantile.py": [
        PRIVATE + "the_private_quantile_matches_the_paper_in_a_scan",
        PRIVATE + "the_private_quantile_over_eight_devices",
        PRIVATE + "one_example_moves_the_count_by_half",
        PRIVATE + "invalid_numbers_of_the_private_quantile_are_rejected",
    ],
    "per_example/factors.py": [
        PARTS,
        PRIVATE + "an_action_matches_its_paper_and_respects_the_bound",
        PRIVATE + "invalid_numbers_are_rejected",
        EXAMPLES + "a_negative_bound_of_examples_counts_as_zero",
    ],
    "per_example/feedback.py": [
        PRIVATE + "error_feedback_is_dice_sgd",
        PRIVATE + "error_feedback_keeps_its_state_and_dtypes_over_a_bad_step",
    ],
    "per_example/": [
        EXAMPLES + "without_jit",
        EXAMPLES + "which_parameters_are_ghosts",
        EXAMPLES + "an_example_of_weight_two_counts_twice",
        EXAMPLES + "a_loss_may_want_a_batch_of_one",
        EXAMPLES + "gradients_of_any_size",
        EXAMPLES + "a_ghost_norm_matches_the_norm_of_the_gradient",
        EXAMPLES + "gradients_that_are_integers_are_summed_as_floats",
        EXAMPLES + "a_negative_bound_of_examples_counts_as_zero",
        EXAMPLES + "bounds_of_layers_by_their_sizes",
        EXAMPLES + "an_example_of_zeros_weighs_nothing_without_gamma",
        "tests/test_parts.py::test_defaults_are_the_papers",
        EXAMPLES + "an_example_of_weight_zero_is_ignored",
        EXAMPLES + "bad_numbers_are_rejected_by_name",
        EXAMPLES + "an_error_of_the_loss_is_quoted",
        EXAMPLES + "keys_shared_arguments_and_auxiliary_outputs",
        EXAMPLES + "auto_counts_parameters",
        EXAMPLES + "bad_arguments_are_rejected",
        EXAMPLES + "batch_norm_is_rejected",
        EXAMPLES + "in_shard_map_each_device_clips_its_own_examples",
    ],
}

# Survivors that were read: what became of the line, and why no test can or need see it.
EQUIVALENT = {
    "lambda u, count: jnp.where(jnp.abs(u) >= 1 - 2 * jnp.finfo(u.dtype).eps,"
    " jnp.sign(u), 0), 2.0,": "not read of a maximum",
    'l1 = Norm("norms.l1", jnp.abs, "sum", lambda pool, count: pool, '
    "lambda u, count: jnp.sign(u), 0.0)": "powers of at most 1 are alike",
    "largest = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial= -1)": "of |x|",
    'if reduce <= "mean":': "the other choice sorts after it",
    'cut = spike & (target < "threshold")': "the other targets sort before it",
    "outputs = [get_aval(site.op.eqn.outvars[ -1]) for site in traced.sites]": "there is one",
    '"conv_general_dilated": (_convolution, 1),': "both operands have one dtype",
    "locked_out = (verdict.reason != NONFINITE) * (state.consecutive_skips >= most)": "of booleans",
    "rest = sorted(used ^ {site.origin.parameter for site in sites})": "sites are of what is used",
    "dtype = known[ -1].dtype if known else xla.accumulator(leaves.arrays)": "all have one dtype",
    "return jax.tree.map(lambda a, b: jnp.where(state.over == relearn_after, a, b),"
    " fresh, state)": "counted one by one",
    "return skip_by(inner, watch, unchecked(math.inf), 0, needs_loss=False)": "none is over inf",
    "return skip_by(inner, watch, unchecked(math.inf), 2, needs_loss=False)": "none is over inf",
    "n >= m": "no slice is larger",
    "statistic = Statistic((0.0, 1.0), learn, bound)": "the first norm has the weight 1",
    'return f"{name} of optax.{makers[ -1]}" if makers else name': "there is one",
    "real = jnp.issubdtype(before.dtype, jnp.floating) or"
    " jnp.issubdtype(after.dtype, jnp.floating)": "integers have no gradient",
    "fine = jnp.isfinite(back.losses) * jnp.all(jnp.isfinite(back.norms), axis=1)": "of booleans",
    'grouped = p["feature_group_count"] > 1 or p["batch_group_count"] != 1': "never below 1",
    "fine = jnp.isfinite(norm) * (statistic.signed | (norm > 0))": "of booleans",
    '"gather": (_table, 0),': "what is looked up has the dtype of the table",
    "reason, loss_state = jnp.where(over, NORM, -1), state.loss": "any but those of a skip",
    "_MICROBATCH_SIZE = 9": "only as fast",
    "fine = ~(norms < _LOST)": "a norm that is right either way",
    "sizes = [1 if uniform else math.prod(shape[ 0:]) for shape in leaves.shapes]": "only shares",
    "if count <= 1:": "no count is 0 there",
    "@functools.lru_cache(maxsize= 255)": "only slower",
    "finite = finite * jnp.isfinite(loss)": "of booleans",
    "threshold = learned(Statistic( -1.0, lambda norm, value, seen: norm, bound),"
    " feed=feeds.clipped)": "not read before the first norm",
    "statistic = Statistic(( -1.0, 0.0), learn, bound)": "the first norm has the weight 1",
    "return jnp.where(seen <= 0, norm, moved)": "a count is not below 0",
}
