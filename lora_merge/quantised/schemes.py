SCHEMES = dict.fromkeys(("fp8", "fp8-block", "fp8-channel", "int8", "int4", "mxfp4", "mxfp8", "nvfp4"))
