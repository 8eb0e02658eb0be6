"""What can stop a recipe.

KitchenError             (types.errors.UserError)
├── ConfigError          a key or value of a config
├── RunFolderError       the output folder holds something else, or not what is needed to resume
└── TrainingDiverged     the loss is no longer a finite number
"""

from __future__ import annotations

from tinsmith.types.errors import UserError


class KitchenError(UserError):
    pass


class ConfigError(KitchenError):
    pass


class RunFolderError(KitchenError):
    pass


class TrainingDiverged(KitchenError):
    pass
