//! io_setup(2): the ring's size, the limits, the order of checks, the accounting.

use libc::{EAGAIN, EFAULT, EINVAL, PROT_NONE, PROT_READ, PROT_WRITE};

use super::Cases;
use crate::{
    aio::{self, Context},
    sys::{self, PAGE, load64, store64},
    world::{KERNEL, NON_CANONICAL, World},
};

const SHAPES: [u64; 32] = [
    1, 2, 3, 4, 8, 16, 31, 32, 61, 62, 63, 64, 100, 126, 127, 128, 190, 191, 200, 255, 256, 500,
    512, 1000, 1024, 2000, 2048, 4096, 8191, 8192, 16384, 30000,
];

/// Values of the word behind `ctxp` and numbers of events that are refused, with what the table
/// says.
const REFUSED: [(&str, u64, u64, i32); 15] = [
    ("nr 0", 0, 0, EINVAL),
    ("nr 2^32", 1 << 32, 0, EINVAL),
    ("nr aio-max-nr's limit of the ring", 4_194_305, 0, EINVAL),
    ("nr 2^23", 8_388_608, 0, EINVAL),
    ("nr -1", u64::MAX, 0, EINVAL),
    ("nr i32::MAX", 0x7fff_ffff, 0, EINVAL),
    ("nr the largest that fits a ring", 4_194_304, 0, EAGAIN),
    ("nr 2^31", 0x8000_0000, 0, EAGAIN),
    ("nr 2^31+1", 0x8000_0001, 0, EAGAIN),
    ("nr 2^31+8", 0x8000_0008, 0, EAGAIN),
    ("nr 2^32-2", 0xffff_fffe, 0, EINVAL),
    ("context 1", 1, 1, EINVAL),
    ("context -1", 1, u64::MAX, EINVAL),
    ("context 1 and nr -1", u64::MAX, 1, EINVAL),
    ("context 1 and nr 2^31", 0x8000_0000, 1, EINVAL),
];

pub fn add(cases: &mut Cases) {
    for nr in SHAPES {
        cases.add(format!("setup/shape {nr}"), move |w| shape(w, nr));
    }
    cases.add("setup/nr is 32 bits wide", |w| shape(w, (1 << 32) + 1));
    for (name, nr, word, errno) in REFUSED {
        cases.add(format!("setup/refused {name}"), move |w| {
            let at = w.memory(8);
            store64(at, word);
            w.rule("io_setup", aio::setup(nr, at), -i64::from(errno));
            w.say(format!("unchanged: {}", load64(at) == word));
        });
    }
    cases.add("setup/more than aio-max-nr", |w| {
        let most = sysctl("aio-max-nr");
        w.rule("io_setup", aio::setup(most + 1, w.memory(8)), -i64::from(EAGAIN));
    });
    pointers(cases);
    ids(cases);
    accounting(cases);
}

fn shape(w: &World, nr: u64) {
    let context = w.context(nr);
    w.say(format!("header {:x?}", context.words()));
    w.say(format!("aligned {}", context.0 % PAGE));
    w.say(format!("mapped {:?}", mapping(context)));
    w.see("io_destroy", aio::destroy(context.0));
    w.say(format!("mapped {:?}", mapping(context)));
}

/// Length and protection of the ring's mapping.
fn mapping(context: Context) -> Option<(u64, String)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).unwrap_or(0));
        let kind = rest.get(..4)?.to_owned();
        (from == context.0).then_some((to - from, kind))
    })
}

fn pointers(cases: &mut Cases) {
    let fault = -i64::from(EFAULT);
    for (name, at) in [
        ("NULL", 0),
        ("-1", u64::MAX),
        ("the kernel's", KERNEL),
        ("not canonical", NON_CANONICAL),
        ("one below the end", 0x7fff_ffff_efff),
    ] {
        for nr in [0, 1, u64::MAX] {
            cases.add(format!("setup/pointer {name}, nr {nr:#x}"), move |w| {
                w.rule("io_setup", aio::setup(nr, at), fault);
            });
        }
    }
    cases.add("setup/pointer into a page without access", move |w| {
        w.rule("io_setup", aio::setup(1, w.page(PROT_NONE)), fault);
    });
    cases.add("setup/pointer into a page that can only be written", |w| {
        let at = w.page(PROT_WRITE);
        w.see("io_setup", aio::setup(1, at).min(0));
    });
    cases.add("setup/pointer into a read-only page undoes everything", move |w| {
        let page = w.page(PROT_READ);
        w.rule("io_setup", aio::setup(1, page), fault);
        w.see("context", load64(page).cast_signed());
        w.say(format!("next id {}", w.context(1).id()));
    });
    cases.add("setup/pointer into a read-only page with a context", |w| {
        let page = w.memory(PAGE);
        store64(page, 7);
        sys::protect(page, PAGE, PROT_READ);
        w.rule("io_setup", aio::setup(1, page), -i64::from(EINVAL));
    });
    cases.add("setup/pointer across the end of a page", move |w| {
        let page = w.memory(PAGE);
        w.rule("io_setup", aio::setup(1, page + PAGE - 4), fault);
    });
    cases.add("setup/pointer at the last word of a page", |w| {
        let page = w.memory(PAGE);
        w.see("io_setup", aio::setup(1, page + PAGE - 8));
    });
    cases.add("setup/pointer unaligned", |w| {
        let page = w.memory(PAGE);
        w.see("io_setup", aio::setup(1, page + 13));
        w.see("remainder", (load64(page + 13) % PAGE).cast_signed());
    });
}

fn ids(cases: &mut Cases) {
    cases.add("setup/ids count from 0", |w| {
        let ids: Vec<u32> = (0..40).map(|_| w.context(1).id()).collect();
        w.say(format!("{ids:?}"));
    });
    cases.add("setup/the lowest free id is used again", |w| {
        let contexts: Vec<_> = (0..6).map(|_| w.context(1)).collect();
        for index in [4, 1, 2] {
            w.see("io_destroy", aio::destroy(contexts[index].0));
        }
        let ids: Vec<u32> = (0..5).map(|_| w.context(1).id()).collect();
        w.say(format!("{ids:?}"));
    });
    cases.add("setup/a refused one takes no id", |w| {
        w.see("io_setup", aio::setup(0, w.memory(8)));
        w.see("io_setup", aio::setup(1, w.page(PROT_READ)));
        w.say(format!("id {}", w.context(1).id()));
    });
    cases.add("setup/no address space", |w| {
        let at = w.memory(8);
        limit_address_space(0);
        w.rule("io_setup", aio::setup(4096, at), -i64::from(libc::ENOMEM));
        w.see("context", load64(at).cast_signed());
        limit_address_space(libc::RLIM_INFINITY);
        w.see("io_setup", aio::setup(4096, at));
    });
}

fn limit_address_space(soft: u64) {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a valid structure.
    unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
}

fn sysctl(name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/sys/fs/{name}")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// How much `step` changes aio-nr. Others on the machine change it too: what most of several
/// tries see counts.
pub fn charge_of(mut step: impl FnMut() -> Box<dyn FnOnce()>) -> i64 {
    let mut seen: Vec<i64> = (0..5)
        .map(|_| {
            let before = sysctl("aio-nr");
            let undo = step();
            let change = sysctl("aio-nr").wrapping_sub(before).cast_signed();
            undo();
            change
        })
        .collect();
    seen.sort_unstable();
    seen[2]
}

fn accounting(cases: &mut Cases) {
    for nr in [1_u64, 31, 100, 129, 5000] {
        cases.add(format!("setup/aio-nr grows by the asked {nr}"), move |w| {
            let at = w.memory(8);
            let change = charge_of(|| {
                store64(at, 0);
                w.must("io_setup", aio::setup(nr, at));
                Box::new(move || {
                    aio::destroy(load64(at));
                })
            });
            w.rule("charged", change, nr.cast_signed());
        });
        cases.add(format!("setup/aio-nr is back after io_destroy of {nr}"), move |w| {
            let at = w.memory(8);
            let change = charge_of(|| {
                store64(at, 0);
                w.must("io_setup", aio::setup(nr, at));
                w.must("io_destroy", aio::destroy(load64(at)));
                Box::new(|| {})
            });
            w.rule("charged", change, 0);
        });
    }
    cases.add("setup/aio-nr is back after a store that failed", |w| {
        let page = w.page(PROT_READ);
        let change = charge_of(|| {
            aio::setup(100, page);
            Box::new(|| {})
        });
        w.rule("charged", change, 0);
    });
    cases.add("setup/aio-nr is back after exit", |w| {
        let at = w.memory(8);
        let change = charge_of(|| {
            let pid = sys::fork();
            if pid == 0 {
                sys::quit(i32::from(aio::setup(500, at) != 0));
            }
            sys::wait_for(pid, 0);
            Box::new(|| {})
        });
        w.rule("charged", change, 0);
    });
    cases.add("setup/the quota of the machine", |w| {
        let most = sysctl("aio-max-nr");
        let at = w.memory(8);
        w.see("io_setup", aio::setup(most / 2 - 2000, at));
        store64(at, 0);
        w.rule("io_setup", aio::setup(most - 2000, at), -i64::from(EAGAIN));
        w.see("context", load64(at).cast_signed());
    });
    cases.add("setup/aio-nr and aio-max-nr have the modes of the kernel's", |w| {
        use std::os::unix::fs::MetadataExt as _;
        for name in ["aio-nr", "aio-max-nr"] {
            let mode = std::fs::metadata(format!("/proc/sys/fs/{name}")).map(|m| m.mode());
            w.say(format!("{name} {:o}", mode.unwrap_or(0)));
        }
    });
}
