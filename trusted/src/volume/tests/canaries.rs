//! Each rule of the design is broken once on purpose: the simulation must notice. A canary that
//! survives means that the simulation no longer tests its rule.

use super::{Canary, crash::check};

/// Seeds after which a canary counts as not caught.
const LIMIT: u64 = 600;

fn caught(canary: Canary, first: u64) {
    super::caught(canary, first, LIMIT, |seed, broken| check(seed, canary, broken));
}

canaries! {
    a_superblock_before_its_nodes_are_flushed_is_caught => NoNodeFlush from 76,
    a_sync_before_its_journal_blocks_are_written_is_caught => EarlySync from 32,
    a_durable_mark_that_runs_ahead_is_caught => EarlyMark from 16,
    a_recovery_that_does_not_verify_is_caught => NoVerify from 13,
    a_recovery_that_does_not_persist_its_decisions_is_caught => NoPersist from 311,
    reuse_before_the_checkpoint_is_caught => EarlyReuse from 1,
    letting_the_last_completion_win_is_caught => LastCompletes from 256,
    a_failed_eager_write_that_is_not_taken_back_is_caught => NoVoid from 19,
    eager_writes_lost_at_the_cut_are_caught => NoCarry from 28,
    a_superblock_that_overtakes_carried_writes_is_caught => NoCarryWait from 1612,
    a_superblock_over_the_last_one_is_caught => SameSlot from 254,
    a_discard_before_the_checkpoint_is_durable_is_caught => EarlyDiscard from 1,
    giving_out_a_place_that_is_being_discarded_is_caught => DiscardUnheld from 1,
    freeing_what_a_snapshot_holds_is_caught => FreeHeld from 1,
    a_birth_number_that_a_snapshot_shares_is_caught => SameBirth from 1,
    a_superblock_that_forgets_a_move_on_its_way_is_caught => NoAttempted from 1,
    a_partial_write_that_shares_its_block_is_caught => SharedPartial from 1,
    a_file_that_forgets_the_durable_record_is_caught => NoDurable from 1,
    an_opening_that_a_late_move_can_overtake_is_caught => NoFence from 160,
    a_journal_place_reused_before_the_superblock_beyond_it_is_caught => EarlyRing from 1,
    a_node_cache_that_goes_by_the_place_alone_is_caught => CacheByPlace from 1,
    a_write_of_a_dead_guest_that_lands_in_the_next_session_is_caught => LateWrites from 263,
    a_place_given_out_while_it_is_being_written_is_caught => InFlightSettled from 1,
    two_blocks_sealed_under_one_nonce_are_caught => SharedNonce from 1,
    a_journal_that_is_read_in_part_after_a_crash_is_caught => BriefScan from 596,
    a_flush_believed_after_one_that_failed_is_caught => FlushAgain from 1,
}
