"""Engines that run models: transformers with PEFT as the reference, and engines that serve the merged checkpoint.

`hf` loads and runs models in transformers, `prompts` chooses the input, `peft_reference` puts an adapter on its base
in PEFT, `reference` measures what they compute, `isolated_modules` runs modules that no prompt reaches, and `vllm`
runs vLLM through `vllm_script`, in the Python environment that has it.
"""
