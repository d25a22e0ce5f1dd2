# For training pipelines: include this in a Makefile, and say how adapters/NAME is trained.
#
#   make merged/NAME            merges adapters/NAME and verifies the output; does nothing when nothing changed
#   make converted/NAME-vllm    rewrites adapters/NAME for an engine: vllm, lmdeploy, lorax, sglang, tgi or llamacpp
#
# Set what you need before the include: BASE = models/Llama-3-8B
# Make sees files, no flags: after changing those, remove merged/NAME.

LORA_MERGE    ?= lora-merge
BASE          ?=
ADAPTERS      ?= adapters
MERGED        ?= merged
CONVERTED     ?= converted
ADAPTER_FILES ?= adapter_config.json adapter_model.safetensors
MERGE_FLAGS   ?=
VERIFY_FLAGS  ?=
CONVERT_FLAGS ?=

# A base in one file has no index; its weights stand for themselves then.
lora-merge-base    = $(if $(BASE),--base $(BASE))
lora-merge-inputs  = $(addprefix $(ADAPTERS)/%/,$(ADAPTER_FILES)) \
	$(if $(BASE),$(wildcard $(addprefix $(BASE)/,config.json *.index.json model.safetensors pytorch_model.bin)))
lora-merge-engines = vllm lmdeploy lorax sglang tgi llamacpp

# A directory is as old as its last file came into it, so each target stands for the file that is written last.
$(MERGED)/%: $(MERGED)/%/merge_manifest.json
	@touch $@

# Nothing has the name merged/NAME that was not verified, whatever ends a run; until then, what was there stays.
# Only an output of lora-merge, or an empty directory, is replaced.
$(MERGED)/%/merge_manifest.json: $(lora-merge-inputs)
	@test -e $@ || test ! -e $(MERGED)/$* || rmdir $(MERGED)/$*
	$(LORA_MERGE) $(lora-merge-base) --adapter $(ADAPTERS)/$* --out $(MERGED)/.new/$* --resume --overwrite $(MERGE_FLAGS)
	$(LORA_MERGE) verify $(MERGED)/.new/$* $(VERIFY_FLAGS)
	@mkdir -p $(MERGED)/.old && rm -rf $(MERGED)/.old/$*
	@test ! -e $(MERGED)/$* || mv $(MERGED)/$* $(MERGED)/.old/$*
	@mv $(MERGED)/.new/$* $(MERGED)/$* && rm -rf $(MERGED)/.old/$*

define lora-merge-for
$(CONVERTED)/%-$(1): $(CONVERTED)/%-$(1)/conversion.json
	@touch $$@

$(CONVERTED)/%-$(1)/conversion.json: $(lora-merge-inputs)
	$(LORA_MERGE) convert $(ADAPTERS)/$$* --for $(1) $(lora-merge-base) --out $(CONVERTED)/$$*-$(1) --overwrite $(CONVERT_FLAGS)

.PRECIOUS: $(CONVERTED)/%-$(1)/conversion.json
endef
$(foreach engine,$(lora-merge-engines),$(eval $(call lora-merge-for,$(engine))))

# Make would remove what it made on the way.
.PRECIOUS: $(MERGED)/%/merge_manifest.json $(addprefix $(ADAPTERS)/%/,$(ADAPTER_FILES))

# Nor would it miss such a file in a directory that is there, were it not named.
.lora-merge-there: $(addsuffix /merge_manifest.json,$(wildcard $(MERGED)/*)) \
	$(addsuffix /conversion.json,$(wildcard $(CONVERTED)/*))
