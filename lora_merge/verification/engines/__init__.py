"""Engines that run models: transformers with PEFT for what base and adapter compute, and those that serve the merge.

`hf` loads and asks in transformers, `prompts` chooses what is asked, `peft_reference` puts an adapter on its base in
PEFT, `reference` measures what they compute, `isolated_modules` asks modules that no prompt reaches, `vllm` asks vLLM
through `vllm_script`, which runs in whichever Python has it.
"""
