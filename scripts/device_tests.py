"""Which tests are run on a device, and which are not, and why.

Each opens its models with all layers on the device, and holds both branches, row for row, against
the judge in float64: scopes, refreshes, policies, forks, rows that wait, two contexts, several
answers in one decode, kept prompts, caches that layers share, hybrids. `tests/test_device.py` adds
what is of a device alone, `tests/test_influence_device.py` the attention that it computes for us.
"""

from __future__ import annotations

_EXACT = "test_exact.py::test_"
_STEPPING = "test_stepping.py::test_"
_REUSE = "test_reuse.py::test_"

CHOSEN = (
    "test_device.py",
    "test_influence_device.py",
    *(
        f"{_EXACT}every_scope_and_refresh_is_the_judges[{tiny}-{scope}-{refresh}]"
        for tiny, scope, refresh in (
            ("llama", "decode", "step"),
            ("llama", "question", "prompt"),
            ("llama", "text", "step"),
            ("llama", "all", "step"),
            ("gemma", "decode", "prompt"),
            ("gemma", "text", "prompt"),
            ("gemma", "all", "step"),
        )
    ),
    f"{_EXACT}every_token_policy_is_the_judges[TopRatio(ratio=1.0)-step]",
    f"{_EXACT}every_token_policy_is_the_judges[MeanStd(factor=0.5)-prompt]",
    f"{_EXACT}every_token_policy_is_the_judges[CumulativeMass(mass=0.5)-step]",
    f"{_EXACT}every_layer_policy_is_the_judges[llama-LayerSet(layers=(0,))-step]",
    f"{_EXACT}every_layer_policy_is_the_judges[gemma-LayerSet(layers=(2, 3, 5))-prompt]",
    f"{_EXACT}every_layer_policy_is_the_judges[llama-AttentionMass(share=0.8)-step]",
    f"{_EXACT}every_layer_policy_is_the_judges[llama-LowestCosine(share=0.2)-prompt]",
    f"{_EXACT}every_layer_policy_is_the_judges[gemma-LowestCosine(share=0.6)-step]",
    f"{_EXACT}masks_differ_from_layer_to_layer_and_from_step_to_step",
    f"{_EXACT}masking_nothing_leaves_the_branches_equal[step]",
    f"{_EXACT}two_images_are_told_apart[llama-apart-text-step]",
    f"{_EXACT}two_images_are_told_apart[gemma-in_a_row-all-prompt]",
    f"{_EXACT}heads_share_keys_in_any_number[1-llama]",
    f"{_EXACT}heads_share_keys_in_any_number[4-gemma3]",
    f"{_EXACT}micro_batches_smaller_than_an_image_change_nothing[llama-13-text-step]",
    f"{_EXACT}micro_batches_smaller_than_an_image_change_nothing[gemma-8-decode-prompt]",
    f"{_EXACT}two_contexts_agree_with_the_judge_and_the_pair[llama-text-step]",
    f"{_EXACT}two_contexts_agree_with_the_judge_and_the_pair[gemma-question-prompt]",
    f"{_EXACT}any_sequence_ids_will_do[llama-pair-seqs0]",
    f"{_EXACT}no_guidance_after_guidance_is_plain_decoding_bit_for_bit[llama-float]",
    *(
        f"{_STEPPING}every_way_is_the_judges[{case}]"
        for case in (
            "llama-text-prompt-fork-all",
            "llama-text-step-fork-all",
            "llama-text-step-lazy-some",
            "llama-decode-step-lazy_fork-some",
            "llama-all-step-lazy_fork-some",
            "llama-question-prompt-adaptive-7",
            "gemma-text-step-fork-all",
            "gemma-text-prompt-lazy_fork-some",
            "gemma-decode-step-adaptive-some",
            "gemma-all-prompt-fork-some",
        )
    ),
    f"{_STEPPING}several_images_and_a_long_end_are_the_judges[llama-text-step-lazy_fork]",
    f"{_STEPPING}several_images_and_a_long_end_are_the_judges[gemma-question-prompt-fork]",
    f"{_STEPPING}a_fork_begins_at_the_first_masked_layer_whatever_it_is"
    "[llama-LayerSet(layers=(1,))-fork]",
    f"{_STEPPING}a_fork_begins_at_the_first_masked_layer_whatever_it_is"
    "[gemma-LayerSet(layers=(5,))-lazy_fork]",
    f"{_STEPPING}nothing_is_left_out_below_layer_0_or_without_layers[fork]",
    f"{_STEPPING}no_count_of_heads_is_taken_for_the_rows[2-2-llama-fork-False]",
    f"{_STEPPING}no_count_of_heads_is_taken_for_the_rows[4-1-gemma3-lazy_fork-False]",
    *(
        f"{_STEPPING}graphs_that_were_forked_are_left_as_they_were[{tiny}-float-{way}]"
        for tiny, way in (("llama", "fork"), ("gemma", "lazy_fork"))
    ),
    "test_plan_forks.py::test_any_rows_fork_behind_any_others[llama-2-4]",
    "test_plan_forks.py::test_any_rows_fork_behind_any_others[gemma-1-5]",
    "test_plan_forks.py::test_the_stream_is_read_of_rows_below_a_fork[llama]",
    "test_plan_forks.py::test_a_decode_after_a_fork_that_failed_is_as_without_it",
    "test_plan_parts.py::test_each_part_reads_the_stream_of_its_own_last_row",
    "test_masks.py",
    "test_sharing.py::test_layers_that_share_a_cache_attend",
    *(
        "test_sharing.py::test_both_branches_are_the_judges"
        f"[LayerRange(start=0.3333333333333333, stop=1.0)-{case}]"
        for case in ("step-pair", "prompt-contexts")
    ),
    *(
        f"test_hybrid.py::test_both_branches_of_a_hybrid_are_the_judges[{layers}-{pairing_tokens}]"
        for layers in (
            "LayerRange(start=0.3333333333333333, stop=1.0)",
            "LayerRange(start=0.0, stop=1.0)",
            "AttentionMass(share=0.5)",
            "LowestCosine(share=1.0)",
        )
        for pairing_tokens in ("contexts-some", "contexts-all", "pair-all")
    ),
    f"{_REUSE}an_answer_takes_the_cells_of_kept_prompts_when_it_needs_them",
    f"{_REUSE}more_questions_about_an_image_are_the_judges[gemma-decode-prompt]",
    f"{_REUSE}a_conversation_goes_on_where_it_stopped[llama-text]",
    "test_graph_patch.py::test_cosines_are_the_judges_and_only_there_when_asked_for",
    "test_vlm.py::test_the_pieces_of_a_stream_are_the_reply",
    *(f"test_vlm.py::test_two_contexts_say_what_a_pair_says[guidance{i}]" for i in (0, 1)),
)
"""Files and tests, as pytest names them, within tests/."""

ALSO_ON_TWO = (
    "test_device.py::test_both_branches_are_the_cpus[eager-step-f32]",
    "test_device.py::test_both_branches_are_the_cpus[fork-prompt-f16]",
    "test_device.py::test_both_branches_are_the_cpus[lazy-step-f32]",
    "test_device.py::test_pairs_fork_wherever_the_layers_lie[all-True]",
)
"""Of them, those that are run with the layers on two devices as well."""

LEFT_OUT = {
    "the other cases of the same tests": "the same graphs with other numbers, hundreds of them: a "
    "decode on lavapipe takes .2 s. On CUDA and Metal --all runs them",
    "tests of prompts, requests, policies, sampling, evaluation, the command line": "nothing of "
    "them computes on a device",
    "the image encoder on the device": "the tests keep it on the CPU: its judge is exact to 1e-4",
    "many answers with many policies (test_batching, most of test_reuse)": "where a choice of "
    "tokens hangs by a hair, a device's rounding turns it: of three questions about one picture "
    "lavapipe takes one token for another once, and that step's logits are .12 off the judge's",
    "strong guidance in a pair and in two contexts": "its tenth token lies at the cut, within what "
    "a device rounds: which way a pair goes, by its clock, decides",
    "a hybrid's pair with half of its tokens hidden": "two influences are 1.2e-5 apart there, and "
    "lavapipe's 4.6e-5 off: on one processor it takes one token for the other at one step, on "
    "another not",
}
ON_MESA_22 = {
    "test_plan_parts.py::test_each_part_reads_the_stream_of_its_own_last_row": "on one processor "
    "of two the process ends in lavapipe of Mesa 22.3.6, whose heap is broken; with Mesa 25.0.7 "
    "(Debian 13) it passes on the same one",
}
"""Of CHOSEN, what is not run with lavapipe of Mesa 22."""
ON_LAVAPIPE = {
    "flash attention": "lavapipe of Mesa 22.3.6 crashes where a shape of one row is compiled "
    "before one of several; llama_cpp alone does too, not each time. GPUs run it",
}
"""What is not run, and why."""
