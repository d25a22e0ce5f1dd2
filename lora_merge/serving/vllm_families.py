"""Model classes of vLLM 0.32.0 that have LoRA, and those that have none.

Reference:
    ``vllm/model_executor/models/registry.py`` and the classes that it names: those that inherit ``SupportsLoRA``, and
    whether ``is_3d_moe_weight`` is set. Classes under ``vllm/models`` differ from device to device and are left out.
"""

from __future__ import annotations

from lora_merge.serving.rules import Families

_SERVED = (
    "AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM "
    "AudioFlamingo3ForConditionalGeneration BagelForConditionalGeneration BailingMoeForCausalLM "
    "BailingMoeV2ForCausalLM BertModel BertSpladeSparseEmbeddingModel BgeM3EmbeddingModel "
    "Blip2ForConditionalGeneration ChatGLMForConditionalGeneration ChatGLMModel ClefOmniForJointSchema "
    "Cohere2ForCausalLM CohereCompassForConditionalGeneration CohereForCausalLM ColPaliForRetrieval "
    "Cosmos3ForConditionalGeneration CwmForCausalLM DeciLMForCausalLM DeepseekForCausalLM "
    "DeepseekOCR2ForCausalLM DeepseekOCRForCausalLM DeepseekV2ForCausalLM DeepseekV3BidirectionalModel "
    "DeepseekV3ForCausalLM DotsOCRForCausalLM Eagle2_5_VLForConditionalGeneration "
    "Emu3ForConditionalGeneration Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM "
    "Ernie4_5_VLMoeForConditionalGeneration Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration "
    "ExaoneForCausalLM ExaoneMoEForCausalLM ExaoneMoeForCausalLM FalconH1ForCausalLM FlexOlmoForCausalLM "
    "GLM4VForCausalLM GPTBigCodeForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM Gemma2Model "
    "Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration "
    "Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM "
    "Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration "
    "GlmAsrForConditionalGeneration GlmForCausalLM GlmOcrForConditionalGeneration GptOssForCausalLM "
    "Granite4VisionForConditionalGeneration GraniteForCausalLM GraniteMoeForCausalLM "
    "GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM "
    "GraniteSWAForCausalLM GraniteSpeechForConditionalGeneration "
    "GraniteSpeechPlusForConditionalGeneration H2OVLChatModel HYV3ForCausalLM HunYuanDenseV1ForCausalLM "
    "HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration HyperCLOVAXForCausalLM "
    "IQuestCoderForCausalLM Idefics3ForConditionalGeneration InternLM2ForCausalLM InternLM2ForRewardModel "
    "InternLM3ForCausalLM InternS1ForConditionalGeneration InternS1ProForConditionalGeneration "
    "InternS2MobiusForConditionalGeneration InternS2PreviewForConditionalGeneration InternVLChatModel "
    "InternVLForConditionalGeneration IsaacForConditionalGeneration Jais2ForCausalLM JambaForCausalLM "
    "JambaForSequenceClassification JinaEmbeddingsV5Model JinaVLForRanking K2HorizonForCausalLM "
    "KeyeForConditionalGeneration KeyeVL1_5ForConditionalGeneration LLaMAForCausalLM LagunaForCausalLM "
    "Lfm2ForCausalLM Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration LightOnOCRForConditionalGeneration "
    "Llama4ForCausalLM Llama4ForConditionalGeneration LlamaForCausalLM LlamaModel "
    "LlamaNemotronVLForSequenceClassification LlamaNemotronVLModel Llama_Nemotron_Nano_VL "
    "LlavaForConditionalGeneration LlavaNextForConditionalGeneration "
    "LlavaNextVideoForConditionalGeneration LongcatFlashForCausalLM LongcatFlashNgramForCausalLM "
    "MellumForCausalLM MiMoForCausalLM MiniCPM3ForCausalLM MiniCPMForCausalLM MiniCPMO MiniCPMV "
    "MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM "
    "Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM MistralLarge3ForCausalLM "
    "MistralModel MixtralForCausalLM ModernBertModel Molmo2ForConditionalGeneration MolmoForCausalLM "
    "MossAudioModel MuseGlimmerForCausalLM MuseGlimmerForConditionalGeneration NVLM_D NanbeigeForCausalLM "
    "NemotronForCausalLM NemotronHForCausalLM NemotronHPuzzleForCausalLM NemotronH_Nano_Omni_Reasoning_V3 "
    "NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 OPTForCausalLM "
    "Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM "
    "OpenCUAForConditionalGeneration OpenPanguVLForConditionalGeneration "
    "PaliGemmaForConditionalGeneration PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM "
    "PanguUltraMoEForCausalLM Param2MoEForCausalLM Phi3ForCausalLM Phi4MMForCausalLM PhiForCausalLM "
    "PhiMoEForCausalLM PixtralForConditionalGeneration Plamo3ForCausalLM "
    "QianfanOCRForConditionalGeneration Qwen2ForCausalLM Qwen2ForProcessRewardModel Qwen2ForRewardModel "
    "Qwen2Model Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration Qwen2_5OmniForConditionalGeneration "
    "Qwen2_5OmniModel Qwen2_5_VLForConditionalGeneration Qwen3ASRForConditionalGeneration "
    "Qwen3ASRForcedAlignerForTokenClassification Qwen3ASRRealtimeGeneration Qwen3ForCausalLM "
    "Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3OmniMoeForConditionalGeneration "
    "Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM "
    "Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration "
    "Rnj1ForCausalLM RobertaForMaskedLM RobertaForSequenceClassification RobertaModel "
    "SarvamMLAForCausalLM SarvamMoEForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM "
    "SmolVLMForConditionalGeneration SolarForCausalLM Starcoder2ForCausalLM TeleChat2ForCausalLM "
    "TeleChat3ForCausalLM TeleFLMForCausalLM UltravoxModel UnlimitedOCRForCausalLM VaultGemmaForCausalLM "
    "VibeVoiceAsrForConditionalGeneration VoxtralForConditionalGeneration VoxtralRealtimeGeneration "
    "VoyageQwen3BidirectionalEmbedModel WhisperForConditionalGeneration "
    "XLMRobertaForSequenceClassification XLMRobertaModel "
)

_REFUSED = (
    "AriaForConditionalGeneration BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM "
    "BailingMoeV3VLForConditionalGeneration BeeForConditionalGeneration BertForMaskedLM "
    "BertForSequenceClassification BertForTokenClassification BloomForCausalLM CLIPModel "
    "Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration CohereAsrForConditionalGeneration "
    "Cosmos3EdgeForConditionalGeneration DbrxForCausalLM DeepseekVLV2ForCausalLM "
    "DiffusionGemmaForBlockDiffusion EmbeddingGemma2Model FalconForCausalLM FalconMambaForCausalLM "
    "FireRedASR2ForConditionalGeneration FunASRForConditionalGeneration "
    "FunAudioChatForConditionalGeneration GPT2ForSequenceClassification GPT2LMHeadModel GPTJForCausalLM "
    "Gemma3TextModel Gemma3nForCausalLM Gemma3nForConditionalGeneration GteModel "
    "GteNewForSequenceClassification GteNewModel HCXVisionV2ForCausalLM HfMoondream HrmTextForCausalLM "
    "IQuestLoopCoderForCausalLM KananaVForConditionalGeneration KimiK25ForConditionalGeneration "
    "KimiVLForConditionalGeneration LlamaBidirectionalForSequenceClassification LlamaBidirectionalModel "
    "LlavaOnevision2ForConditionalGeneration LlavaOnevisionForConditionalGeneration Mamba2ForCausalLM "
    "MambaForCausalLM MiDashengLMModel MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiMoV2OmniForCausalLM "
    "ModernBertForSequenceClassification ModernBertForTokenClassification Moondream3ForCausalLM "
    "MoonshotKimiaForCausalLM MossTranscribeDiarizeForConditionalGeneration "
    "NemotronParseForConditionalGeneration NomicBertModel OpenAIPrivacyFilterForTokenClassification "
    "OpenVLAForActionPrediction OrionForCausalLM Ovis Ovis2_5 Ovis2_6ForCausalLM Ovis2_6_MoeForCausalLM "
    "PaddleOCRVLForConditionalGeneration Phi3VForCausalLM Phi4ForCausalLMV "
    "Qwen2AudioForConditionalGeneration RForConditionalGeneration RobertaForTokenClassification "
    "SiglipModel SkyworkR1VChatModel StableLmForCausalLM Step1ForCausalLM Step3TextForCausalLM "
    "Step3VLForConditionalGeneration Step3p5ForCausalLM Step3p7ForConditionalGeneration "
    "StepVLForConditionalGeneration Terratorch XLMRobertaForTokenClassification Zamba2ForCausalLM "
)

_REMOVED = (
    "AquilaForCausalLM AquilaModel ArcticForCausalLM AyaVisionForConditionalGeneration "
    "BaiChuanForCausalLM BaichuanForCausalLM BambaForCausalLM ChameleonForConditionalGeneration Cheers "
    "CheersForConditionalGeneration DonutForConditionalGeneration Dots1ForCausalLM "
    "ErnieForSequenceClassification ErnieForTokenClassification ErnieModel Fairseq2LlamaForCausalLM "
    "FireRedLIDForConditionalGeneration FuyuForCausalLM GritLM Grok1ForCausalLM Grok1ModelForCausalLM "
    "HCXVisionForCausalLM InternLM2VEForCausalLM InternLMForCausalLM JAISLMHeadModel MPTForCausalLM "
    "MantisForConditionalGeneration MiniMaxForCausalLM MiniMaxM1ForCausalLM MiniMaxText01ForCausalLM "
    "MiniMaxVL01ForConditionalGeneration MllamaForConditionalGeneration MotifForCausalLM MptForCausalLM "
    "MusicFlamingoForConditionalGeneration OuroForCausalLM PersimmonForCausalLM Phi3SmallForCausalLM "
    "Phi4FlashForCausalLM Phi4MultimodalForCausalLM Plamo2ForCausalLM PrithviGeoSpatialMAE "
    "QWenLMHeadModel QwenVLForConditionalGeneration RWForCausalLM StableLMEpochForCausalLM "
    "Tarsier2ForConditionalGeneration TarsierForConditionalGeneration TeleChatForCausalLM "
    "XverseForCausalLM "
)
"""Classes that an older release served and this one does not."""

_STACKED = (
    "ClefOmniForJointSchema GptOssForCausalLM InternS1ProForConditionalGeneration "
    "InternS2MobiusForConditionalGeneration InternS2PreviewForConditionalGeneration "
    "Qwen3OmniMoeForConditionalGeneration Qwen3VLMoeForConditionalGeneration "
    "Qwen3_5MoeForConditionalGeneration "
)
STACKED_EXPERTS = frozenset(_STACKED.split())
"""Classes with ``is_3d_moe_weight``: their LoRA on experts is one pair of factors for the whole stack."""

FAMILIES = Families(
    key="class",
    served=dict.fromkeys(_SERVED.split(), ""),
    refused=frozenset(f"{_REFUSED} {_REMOVED}".split()),
    source="vllm 0.32.0, vllm/model_executor/models/registry.py and interfaces.py:SupportsLoRA, read",
)
