"""After a crash: what is known of a migration, who may run the guest, and how it is made so."""
