"""The profile: what every rank of every layer costs and retains, and the file that keeps it."""

from rankopt.profile.info import BackendInfo as BackendInfo
from rankopt.profile.info import ProfileInfo as ProfileInfo
from rankopt.profile.info import ScaleInfo as ScaleInfo
from rankopt.profile.profile import Profile as Profile
