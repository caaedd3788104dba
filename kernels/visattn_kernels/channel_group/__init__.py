"""Channel-group attention: channels attend to channels over all tokens (DaViT, arXiv 2204.03645, section 3.3)."""

from .api import channel_group_attention

__all__ = ["channel_group_attention"]
