# For training pipelines: include this in a Makefile, and say how adapters/NAME is trained.
#
#   make merged/NAME            merges adapters/NAME and verifies the output; does nothing when nothing changed
#   make converted/NAME-vllm    rewrites adapters/NAME for an engine: vllm, lmdeploy, lorax, sglang, tgi or llamacpp
#
# Set what you need before the include: BASE = models/Llama-3-8B

LORA_MERGE    ?= lora-merge
BASE          ?=
ADAPTERS      ?= adapters
MERGED        ?= merged
CONVERTED     ?= converted
ADAPTER_FILES ?= adapter_config.json adapter_model.safetensors
MERGE_FLAGS   ?=
VERIFY_FLAGS  ?=
CONVERT_FLAGS ?=

lora-merge-base    = $(if $(BASE),--base $(BASE))
lora-merge-inputs  = $(addprefix $(ADAPTERS)/%/,$(ADAPTER_FILES)) $(wildcard $(BASE)/config.json $(BASE)/*.index.json)

# A directory is as old as its last file came into it, so each target stands for the file that is written last.
$(MERGED)/%: $(MERGED)/%/merge_manifest.json
	@touch $@

# What fails its verification does not keep the name that others take for a good one.
$(MERGED)/%/merge_manifest.json: $(lora-merge-inputs)
	$(LORA_MERGE) $(lora-merge-base) --adapter $(ADAPTERS)/$* --out $(MERGED)/$* --resume --overwrite $(MERGE_FLAGS)
	$(LORA_MERGE) verify $(MERGED)/$* $(VERIFY_FLAGS) || \
		{ rm -rf $(MERGED)/$*.rejected; mv $(MERGED)/$* $(MERGED)/$*.rejected; exit 1; }

define lora-merge-for
$(CONVERTED)/%-$(1): $(CONVERTED)/%-$(1)/conversion.json
	@touch $$@

$(CONVERTED)/%-$(1)/conversion.json: $(lora-merge-inputs)
	$(LORA_MERGE) convert $(ADAPTERS)/$$* --for $(1) $(lora-merge-base) --out $(CONVERTED)/$$*-$(1) --overwrite $(CONVERT_FLAGS)
endef
$(foreach engine,vllm lmdeploy lorax sglang tgi llamacpp,$(eval $(call lora-merge-for,$(engine))))

# Make would remove what it made on the way.
.PRECIOUS: $(MERGED)/%/merge_manifest.json $(CONVERTED)/%/conversion.json $(addprefix $(ADAPTERS)/%/,$(ADAPTER_FILES))
