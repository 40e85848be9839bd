//! Signals that come while a thread waits for events.

use std::thread::JoinHandle;

use libc::{SA_RESTART, SIGUSR1, SIGUSR2};

use super::Cases;
use crate::{
    aio::{self, Context, Event, Iocb, op},
    sys,
    world::{LONG, World, how_it_ended, until_asleep, until_asleep_in, until_word},
};

/// A thread that does something to this one once it sleeps.
fn when_asleep(work: impl FnOnce(i32) + Send + 'static) -> JoinHandle<()> {
    let me = sys::thread();
    std::thread::spawn(move || {
        until_asleep(me);
        work(me);
    })
}

/// A mask that blocks these signals, as io_pgetevents takes it.
fn mask_of(w: &World, signals: &[i32]) -> u64 {
    let (mask, pair) = (w.memory(8), w.memory(16));
    sys::store64(mask, signals.iter().fold(0, |bits, signal| bits | sys::signal_bit(*signal)));
    sys::put(pair, &[mask, 8]);
    pair
}

/// SIGUSR1 is counted, blocked, and pending.
fn pend() {
    sys::count_signal(SIGUSR1, 0);
    sys::mask_signal(libc::SIG_BLOCK, SIGUSR1);
    sys::signal_thread(sys::thread(), SIGUSR1);
}

/// A request that completes at once, submitted from any thread.
fn ready_request(w: &World) -> u64 {
    let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
    w.list(&[w.place(&Iocb::new(op::PREAD, fd, buffer, 8, 0).data(7))])
}

fn wait(w: &World, context: Context, min: i64, how: Option<u64>) {
    let at = w.memory(32 * 8);
    let timeout = w.duration(LONG);
    let got = match how {
        None => aio::get(context.0, min, 8, at, timeout),
        Some(mask) => aio::get_masked(context.0, min, 8, at, timeout, mask),
    };
    w.see("wait", got);
    for i in 0..got.max(0).cast_unsigned() {
        w.say(w.event(&Event::load(at + 32 * i)));
    }
    w.say(format!("signals {}, blocked {:#x}", sys::signals(), sys::signal_mask()));
}

pub fn add(cases: &mut Cases) {
    for (call, with_mask) in [("io_getevents", false), ("io_pgetevents", true)] {
        for (name, flags) in [("", 0), (", SA_RESTART", SA_RESTART)] {
            for (already, what) in [(0, "nothing"), (2, "some events")] {
                cases.add(format!("signals/a handler ends {call} with {what}{name}"), move |w| {
                    sys::count_signal(SIGUSR1, flags);
                    let context = w.context(8);
                    let list = ready_request(w);
                    (0..already).for_each(|_| {
                        aio::submit(context.0, 1, list);
                    });
                    let sender = when_asleep(|me| {
                        sys::signal_thread(me, SIGUSR1);
                    });
                    wait(w, context, 4, with_mask.then(|| mask_of(w, &[])));
                    let _ = sender.join();
                });
            }
        }
        for (name, signal) in
            [("ignored", libc::SIGUSR1), ("SIGCHLD", libc::SIGCHLD), ("SIGWINCH", libc::SIGWINCH)]
        {
            cases.add(format!("signals/{call} does not see a signal that is {name}"), move |w| {
                if signal == SIGUSR1 {
                    sys::ignore_signal(signal);
                }
                let context = w.context(8);
                let list = ready_request(w);
                let sender = when_asleep(move |me| {
                    sys::signal_thread(me, signal);
                    until_asleep(me);
                    aio::submit(context.0, 1, list);
                });
                wait(w, context, 1, with_mask.then(|| mask_of(w, &[])));
                let _ = sender.join();
            });
        }
        cases.add(format!("signals/a blocked signal does not end {call}"), move |w| {
            sys::count_signal(SIGUSR1, 0);
            sys::mask_signal(libc::SIG_BLOCK, SIGUSR1);
            let context = w.context(8);
            let list = ready_request(w);
            let sender = when_asleep(move |me| {
                sys::signal_thread(me, SIGUSR1);
                until_asleep(me);
                aio::submit(context.0, 1, list);
            });
            wait(w, context, 1, with_mask.then(|| mask_of(w, &[SIGUSR1])));
            sys::mask_signal(libc::SIG_UNBLOCK, SIGUSR1);
            w.say(format!("signals {}", sys::signals()));
            let _ = sender.join();
        });
        cases.add(format!("signals/a deadly signal ends {call}"), move |w| {
            let context = w.context(8);
            let pid = sys::fork();
            if pid == 0 {
                let own = w.context(8);
                wait(w, own, 1, with_mask.then(|| mask_of(w, &[])));
                sys::quit(3);
            }
            until_asleep_in(pid, pid);
            sys::kill(pid, libc::SIGTERM);
            w.see_child("child", pid);
            w.see("in the ring", context.ready().into());
        });
    }
    masks(cases);
    stops(cases);
    wakes(cases);
}

fn masks(cases: &mut Cases) {
    cases.add("signals/pending and let in by the mask", |w| {
        pend();
        wait(w, w.context(8), 1, Some(mask_of(w, &[])));
    });
    cases.add("signals/pending and let in by the mask, events ready", |w| {
        pend();
        let (context, list) = (w.context(8), ready_request(w));
        aio::submit(context.0, 1, list);
        wait(w, context, 1, Some(mask_of(w, &[])));
    });
    cases.add("signals/pending and let in, min 0", |w| {
        pend();
        wait(w, w.context(8), 0, Some(mask_of(w, &[])));
    });
    cases.add("signals/pending and kept out", |w| {
        pend();
        let mask = mask_of(w, &[SIGUSR1, SIGUSR2]);
        let answer =
            aio::get_masked(w.context(8).0, 1, 1, w.memory(64), w.time(0, 1_000_000), mask);
        w.see("io_pgetevents", answer);
        w.say(format!("signals {}, blocked {:#x}", sys::signals(), sys::signal_mask()));
    });
    cases.add("signals/blocked by the mask only, handled afterwards", |w| {
        sys::count_signal(SIGUSR1, 0);
        let context = w.context(8);
        let list = ready_request(w);
        let sender = when_asleep(move |me| {
            sys::signal_thread(me, SIGUSR1);
            until_asleep(me);
            aio::submit(context.0, 1, list);
        });
        wait(w, context, 1, Some(mask_of(w, &[SIGUSR1])));
        let _ = sender.join();
    });
    cases.add("signals/pending without a mask", |w| {
        pend();
        let answer = aio::get(w.context(8).0, 1, 1, w.memory(64), w.time(0, 1_000_000));
        w.see("io_getevents", answer);
        w.say(format!("signals {}", sys::signals()));
    });
}

/// Stopping and continuing: seen from outside, in a child.
fn stops(cases: &mut Cases) {
    for (call, with_mask) in [("io_getevents", false), ("io_pgetevents", true)] {
        cases.add(format!("signals/stop and continue in {call}"), move |w| {
            let pid = sys::fork();
            if pid == 0 {
                let context = w.context(8);
                let timeout = w.time(0, 400_000_000);
                let at = w.memory(64);
                let got = if with_mask {
                    let mask = mask_of(w, &[]);
                    aio::get_masked(context.0, 1, 1, at, timeout, mask)
                } else {
                    aio::get(context.0, 1, 1, at, timeout)
                };
                w.see("wait", got);
                sys::quit(0);
            }
            until_asleep_in(pid, pid);
            sys::kill(pid, libc::SIGSTOP);
            let stopped = sys::wait_for(pid, libc::WUNTRACED);
            w.say(format!("stopped: {}", how_it_ended(stopped)));
            sys::kill(pid, libc::SIGCONT);
            w.see_child("child", pid);
        });
    }
}

/// What wakes a waiter, other than signals.
fn wakes(cases: &mut Cases) {
    for min in [1_i64, 3] {
        cases.add(format!("signals/another thread's requests wake a waiter for {min}"), move |w| {
            let (context, list) = (w.context(8), ready_request(w));
            let sender = when_asleep(move |_| {
                (0..min).for_each(|_| {
                    aio::submit(context.0, 1, list);
                });
            });
            wait(w, context, min, None);
            let _ = sender.join();
        });
    }
    cases.add("signals/a waiter for 3 sleeps on with 2", |w| {
        let (context, list) = (w.context(8), ready_request(w));
        let (asleep, go) = (w.shared_word(), w.shared_word());
        let sender = when_asleep(move |me| {
            (0..2).for_each(|_| {
                aio::submit(context.0, 1, list);
            });
            sys::store32(asleep, u32::from(until_asleep(me)));
            sys::store32(go, 1);
            aio::submit(context.0, 1, list);
        });
        wait(w, context, 3, None);
        until_word(go, 1);
        w.say(format!("slept on {}", sys::load32(asleep)));
        let _ = sender.join();
    });
    cases.add("signals/a later waiter for 1 overtakes one for 3", |w| {
        let (context, list) = (w.context(8), ready_request(w));
        let (at, timeout, number) = (w.memory(256), w.duration(LONG), w.shared_word());
        let first = std::thread::spawn(move || {
            sys::store32(number, sys::thread().cast_unsigned());
            aio::get(context.0, 3, 8, at, timeout)
        });
        while sys::load32(number) == 0 {
            sys::give_way();
        }
        until_asleep(sys::load32(number).cast_signed());
        let second = when_asleep(move |_| {
            aio::submit(context.0, 1, list);
        });
        wait(w, context, 1, None);
        let _ = second.join();
        (0..3).for_each(|_| {
            aio::submit(context.0, 1, list);
        });
        w.see("the one for 3", first.join().unwrap_or(-1));
    });
}
