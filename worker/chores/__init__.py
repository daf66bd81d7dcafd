"""Work that is done beside jobs, by the clock."""
