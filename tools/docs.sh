#!/usr/bin/env bash
# The documentation as a site that needs no network: README, cards, recipes and the API reference, in site/.
#
#   bash tools/docs.sh [--no-venv]
#
# A link that leads nowhere, or a docstring that does not fit its function, is an error.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
NEEDED+=(ruff)
use_environment "$@"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "mkdocstrings needs Python >= 3.11; this is $("$PYTHON" --version)." "Remedy: PYTHON=/path/to/python3.12 bash $0"
if [[ $PYTHON == "$ROOT/.venv/bin/python" ]]; then install_more requirements/docs.txt; fi
"$PYTHON" -c 'import material, mkdocstrings_handlers.python' ||
    die "the documentation's packages are missing." "Remedy: $PYTHON -m pip install -r requirements/docs.txt"

say "mkdocs"
NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs build --config-file tools/docs/mkdocs.yml
say "open site/index.html"
