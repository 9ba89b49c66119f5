from torch import nn

try:
    from swinmoe.moe import MoEMlp
except ImportError:

    class MoEMlp(nn.Module):  # type: ignore[no-redef]
        """Stands in until `swinmoe.moe.layer` is committed."""
