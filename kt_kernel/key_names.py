"""Where a server looks for the key that its clients must give: variables of its environment."""

KEY = "KT_API_KEY"  # the key itself
KEY_FILE = "KT_API_KEY_FILE"  # a file of one line
