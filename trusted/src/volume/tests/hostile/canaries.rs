//! Each check of the boundary is left out once: the campaign must notice. One that survives means
//! that the campaign no longer tests its attack.

use super::{Canary, check};

/// Seeds after which a canary counts as not caught.
const LIMIT: u64 = 400;

fn caught(canary: Canary, first: u64) {
    super::super::caught(canary, first, LIMIT, check);
}

canaries! {
    a_completion_of_an_earlier_use_of_an_index_is_caught => AnyGeneration from 40,
    an_answer_to_what_only_the_daemon_before_was_asked_is_caught => BeforeHandover from 650,
    a_second_completion_that_counts_is_caught => TwiceDone from 59,
    a_length_that_cannot_be_and_is_believed_is_caught => AnyResult from 115,
    a_part_that_is_taken_for_the_whole_is_caught => ShortIsWhole from 54,
    a_cursor_that_may_run_ahead_is_caught => AnyCursor from 2,
    a_cursor_that_may_go_back_is_caught => CursorBack from 1166,
    a_cursor_read_back_from_the_host_is_caught => SharedCursor from 1,
    a_word_that_is_loaded_twice_is_caught => TwiceLoaded from 1,
    a_buffer_that_is_opened_at_a_second_look_is_caught => OpenedTwice from 16,
    a_block_whose_tag_does_not_fit_is_caught => AnyTag from 8,
    a_buffer_handed_out_before_the_answer_is_caught => EarlyBuffer from 36,
    a_poisoned_lane_that_goes_on_is_caught => AfterPoison from 7,
    a_call_without_a_limit_is_caught => NoLimit from 1,
    a_doorbell_rung_under_the_lock_is_caught => LockedBell from 1,
}
