"""How networks and exits learn: losses, phases, loops, several processes. No record is made."""
