"""Attacks: from what a threat model shows to reconstructions. Nothing private is in reach here."""
