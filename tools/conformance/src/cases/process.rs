//! Processes and mappings: fork, exec, exit, CLONE_VM, and a ring that moves.

use libc::{EFAULT, EINVAL, MREMAP_FIXED, MREMAP_MAYMOVE, O_DIRECT, O_RDONLY, O_RDWR, PROT_NONE};

use super::Cases;
use crate::{
    aio::{self, Context, Iocb, op},
    sys::{self, PAGE},
    world::World,
};

fn read(w: &World) -> Iocb {
    Iocb::new(op::PREAD, w.open(O_RDONLY), w.memory(64), 16, 0)
}

/// Submits reads of the file's first eight pages; answers where they go.
fn submit_eight(w: &World, context: Context, fd: i32) -> u64 {
    let buffer = w.memory(8 * PAGE);
    let iocbs: Vec<Iocb> = (0..8)
        .map(|i| Iocb::new(op::PREAD, fd, buffer + i * PAGE, PAGE, (i * PAGE) as i64).data(i))
        .collect();
    w.see("io_submit", w.submit(context, &iocbs));
    buffer
}

pub fn add(cases: &mut Cases) {
    cases.add("process/every descriptor that /proc lists is the program's own", |w| {
        w.one(Iocb::new(op::PREAD, w.open(O_RDWR | O_DIRECT), w.memory(PAGE), PAGE, 0));
        for directory in ["/proc/self/fd", "/proc/self/fdinfo", "/proc/thread-self/fd"] {
            let names = std::fs::read_dir(directory).into_iter().flatten().flatten();
            let numbers = names.filter_map(|name| name.file_name().to_str()?.parse::<i32>().ok());
            let numbers: Vec<i32> = numbers.collect();
            // SAFETY: plain numbers.
            let flags = |fd: &i32| sys::answer(unsafe { libc::fcntl(*fd, libc::F_GETFD) }.into());
            // The directory's own descriptor is closed again.
            let strange = numbers.iter().filter(|fd| flags(fd) < 0).count();
            w.say(format!("{directory}: some {}, strange {strange}", !numbers.is_empty()));
        }
    });
    forks(cases);
    ends(cases);
    moves(cases);
}

fn forks(cases: &mut Cases) {
    type Call = fn(&World, u64) -> i64;
    let calls: [(&str, Call); 5] = [
        ("io_submit", |w, context| w.submit(Context(context), &[read(w)])),
        ("io_submit of nothing", |_, context| aio::submit(context, 0, 0)),
        ("io_getevents", |w, context| aio::get(context, 0, 1, w.memory(64), w.time(0, 0))),
        ("io_cancel", |w, context| aio::cancel(context, w.place(&read(w)), 0)),
        ("io_destroy", |_, context| aio::destroy(context)),
    ];
    for (name, call) in calls {
        cases.add(
            format!("process/a forked child has not its parent's context: {name}"),
            move |w| {
                let context = w.context(4);
                w.see("io_submit", w.submit(context, &[read(w)]));
                w.in_child("child", || {
                    w.rule(name, call(w, context.0), -i64::from(EINVAL));
                });
                w.reap(context, 1);
                w.one_in(context, read(w));
                w.rule("io_destroy", aio::destroy(context.0), 0);
            },
        );
    }
    cases.add("process/a forked child makes contexts of its own", |w| {
        let context = w.context(4);
        w.in_child("child", || {
            let own = w.context(4);
            w.say(format!("id {}", own.id()));
            w.one_in(own, read(w));
            w.see("io_destroy", aio::destroy(own.0));
        });
        w.one_in(context, read(w));
        w.say(format!("next id {}", w.context(1).id()));
    });
    cases.add("process/a grandchild too", |w| {
        let fd = w.open(O_RDWR | O_DIRECT);
        let buffer = w.memory(PAGE);
        w.in_child("child", || {
            w.one(Iocb::new(op::PREAD, fd, buffer, PAGE, 0));
            w.in_child("grandchild", || {
                w.one(Iocb::new(op::PREAD, fd, buffer, PAGE, 4096));
            });
            w.one(Iocb::new(op::PREAD, fd, buffer, PAGE, 8192));
        });
        w.one(Iocb::new(op::PREAD, fd, buffer, PAGE, 0));
    });
    cases.add("process/what a child writes its parent reads", |w| {
        let fd = w.open(O_RDWR | O_DIRECT);
        w.in_child("child", || {
            w.one(Iocb::new(op::PWRITE, fd, w.filled(PAGE, 0x39), PAGE, 4096));
            w.one(Iocb::new(op::PWRITE, fd, w.filled(PAGE, 0x3a), PAGE, 1 << 20));
        });
        w.see_file();
    });
    cases.add("process/requests in flight across a fork stay the parent's", |w| {
        let (context, fd) = (w.context(16), w.open(O_RDWR | O_DIRECT));
        let buffer = submit_eight(w, context, fd);
        w.in_child("child", || ());
        w.reap_any_order(context, 8);
        w.see_memory("memory", buffer, 8 * PAGE);
    });
    cases.add("process/many children at once", |w| {
        let fd = w.open(O_RDWR | O_DIRECT);
        let children: Vec<i32> = (0..8)
            .map(|number| {
                let pid = sys::fork();
                if pid == 0 {
                    let (context, page) = (w.context(8), w.filled(PAGE, number));
                    let offset = i64::from(number) * 4096;
                    let answer =
                        w.submit(context, &[Iocb::new(op::PWRITE, fd, page, PAGE, offset)]);
                    let (got, events) = w.take(context, 1);
                    sys::quit(i32::from(answer != 1 || got != 1 || events[0].res != 4096));
                }
                pid
            })
            .collect();
        children.into_iter().for_each(|pid| w.see_child("child", pid));
        w.see_file();
    });
    cases.add("process/a child of clone(CLONE_VM) shares the context", |w| {
        let context = w.context(8);
        let at = w.place(&read(w).data(6));
        let (list, done, stack) = (w.list(&[at]), w.shared_word(), w.memory(256 << 10));
        let work = Box::into_raw(Box::new((context.0, list, done)));
        // SAFETY: the stack is this child's alone; what it is given outlives it.
        let pid = unsafe {
            libc::clone(
                submit_in_child,
                (stack + (256 << 10)) as *mut _,
                libc::CLONE_VM | libc::SIGCHLD,
                work.cast(),
            )
        };
        w.see_child("child", pid);
        w.see("io_submit in the child", i64::from(sys::load32(done)) - 100);
        w.reap(context, 1);
    });
}

extern "C" fn submit_in_child(work: *mut libc::c_void) -> i32 {
    // SAFETY: made by the case above.
    let (context, list, done) = unsafe { *work.cast::<(u64, u64, u64)>() };
    let answer = aio::submit(context, 1, list);
    sys::store32(done, u32::try_from(answer + 100).unwrap_or(0));
    0
}

fn ends(cases: &mut Cases) {
    for (name, count) in [("one write", 1), ("many writes", 24)] {
        cases.add(format!("process/exit finishes {name} in flight"), move |w| {
            let fd = w.open(O_RDWR | O_DIRECT);
            w.in_child("child", || {
                let (context, buffer) = (w.context(32), w.filled(PAGE, 0x4e));
                let iocbs: Vec<Iocb> =
                    (0..count).map(|i| Iocb::new(op::PWRITE, fd, buffer, PAGE, i * 4096)).collect();
                w.see("io_submit", w.submit(context, &iocbs));
            });
            w.see_file();
        });
    }
    cases.add("process/exec finishes writes in flight", |w| {
        let fd = w.open(O_RDWR | O_DIRECT);
        w.in_child("child", || {
            let (context, buffer) = (w.context(32), w.filled(PAGE, 0x4f));
            let iocbs: Vec<Iocb> =
                (0..16).map(|i| Iocb::new(op::PWRITE, fd, buffer, PAGE, i * 4096)).collect();
            w.see("io_submit", w.submit(context, &iocbs));
            let arguments = [c"true".as_ptr(), std::ptr::null()];
            // SAFETY: an array that ends in NULL.
            unsafe { libc::execvp(c"true".as_ptr(), arguments.as_ptr()) };
            sys::quit(9);
        });
        w.see_file();
    });
    cases.add("process/a thread's end leaves its requests alone", |w| {
        let (context, fd) = (w.context(16), w.open(O_RDWR | O_DIRECT));
        let (buffer, answers) = (w.memory(8 * PAGE), w.memory(64));
        let iocbs: Vec<u64> = (0..8)
            .map(|i| Iocb::new(op::PREAD, fd, buffer + i * PAGE, PAGE, (i * PAGE) as i64).data(i))
            .map(|iocb| w.place(&iocb))
            .collect();
        let list = w.list(&iocbs);
        let thread = std::thread::spawn(move || {
            sys::store64(answers, aio::submit(context.0, 8, list).cast_unsigned());
        });
        let _ = thread.join();
        w.see("io_submit", sys::load64(answers).cast_signed());
        w.reap_any_order(context, 8);
    });
}

fn moves(cases: &mut Cases) {
    cases.add("process/mremap moves a context", |w| {
        let context = w.context(8);
        w.see("io_submit", w.submit(context, &[read(w).data(1)]));
        let place = w.memory(context.bytes());
        let flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        let to = sys::remap(context.0, context.bytes(), context.bytes(), flags, place);
        w.say(format!("moved {}", to.cast_unsigned() == place));
        w.rule("old", aio::submit(context.0, 0, 0), -i64::from(EINVAL));
        let moved = Context(place);
        w.say(format!("header {:x?}", moved.words()));
        w.see("io_submit", w.submit(moved, &[read(w).data(2)]));
        w.reap(moved, 2);
        w.rule("io_destroy", aio::destroy(moved.0), 0);
        w.rule("again", aio::destroy(moved.0), -i64::from(EINVAL));
    });
    cases.add("process/mremap with requests in flight", |w| {
        let (context, fd) = (w.context(16), w.open(O_RDWR | O_DIRECT));
        submit_eight(w, context, fd);
        let place = w.memory(context.bytes());
        let flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        sys::remap(context.0, context.bytes(), context.bytes(), flags, place);
        w.reap_any_order(Context(place), 8);
    });
    cases.add("process/mremap does not grow a ring", |w| {
        let context = w.context(8);
        let bytes = context.bytes();
        let answer = sys::remap(context.0, bytes, 2 * bytes, MREMAP_MAYMOVE, 0);
        w.rule("mremap", answer, -i64::from(EFAULT));
        w.one_in(context, read(w));
    });
    cases.add("process/a large ring moves", |w| {
        let context = w.context(1000);
        let place = w.memory(context.bytes());
        let flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        let to = sys::remap(context.0, context.bytes(), context.bytes(), flags, place);
        w.say(format!("moved {}", to.cast_unsigned() == place));
        let moved = Context(place);
        for _ in 0..5 {
            w.see("io_submit", w.submit(moved, &vec![read(w); 600]));
            let (got, _) = w.take(moved, 600);
            w.say(format!("{got} head {} tail {}", moved.head(), moved.tail()));
        }
    });
    cases.add("process/munmap of a ring with requests in flight", |w| {
        let (context, fd) = (w.context(16), w.open(O_RDWR | O_DIRECT));
        let counter = w.eventfd(0, 0);
        let iocb = Iocb::new(op::PREAD, fd, w.memory(PAGE), PAGE, 0).signalling(counter);
        w.see("io_submit", w.submit(context, &[iocb]));
        w.see("munmap", sys::unmap(context.0, context.bytes()));
        w.see_counter(counter);
        w.rule("io_destroy", aio::destroy(context.0), -i64::from(EINVAL));
        w.say(format!("next id {}", w.context(1).id()));
    });
    cases.add("process/a ring without access completes requests", |w| {
        let context = w.context(16);
        sys::protect(context.0, PAGE, PROT_NONE);
        sys::protect(context.0, PAGE, libc::PROT_READ | libc::PROT_WRITE);
        w.one_in(context, read(w));
        let counter = w.eventfd(0, 0);
        let fd = w.open(O_RDWR | O_DIRECT);
        let iocb = Iocb::new(op::PREAD, fd, w.memory(PAGE), PAGE, 0).signalling(counter);
        w.see("io_submit", w.submit(context, &[iocb]));
        sys::protect(context.0, PAGE, PROT_NONE);
        w.see_counter(counter);
        sys::protect(context.0, PAGE, libc::PROT_READ | libc::PROT_WRITE);
        w.reap(context, 1);
    });
}
