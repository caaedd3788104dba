# MMSegmentation's runtime with our backbones. Nothing else is needed to use them in a config of one's own.
_base_ = "mmseg::_base_/default_runtime.py"
custom_imports = dict(imports=["visattn_tools.mm"], allow_failed_imports=False)
custom_hooks = [dict(type="ThroughputHook")]
