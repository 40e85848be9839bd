//! The cases of the differential suite, a file for each group of rules.

mod cancel;
mod capacity;
mod destroy;
mod direct;
mod events;
mod kinds;
mod libaio;
mod lookup;
mod order;
mod poll;
mod process;
mod read_write;
mod scale;
mod setup;
mod signals;
mod submit;
mod sync;

use crate::world::World;

/// One case: what it does and says must not depend on where it runs.
pub struct Case {
    pub name: String,
    pub run: Box<dyn Fn(&World)>,
}

impl Case {
    /// Whether it looks at counts that every program of the machine changes.
    pub fn is_of_machine(&self) -> bool {
        ["setup/aio-nr", "setup/the quota", "scale/"].iter().any(|part| self.name.starts_with(part))
    }
}

/// Gathers cases.
#[derive(Default)]
pub struct Cases(Vec<Case>);

impl Cases {
    /// Adds a case.
    pub fn add(&mut self, name: impl Into<String>, run: impl Fn(&World) + 'static) {
        self.0.push(Case { name: name.into(), run: Box::new(run) });
    }
}

/// All cases, in a fixed order.
pub fn all() -> Vec<Case> {
    let mut cases = Cases::default();
    setup::add(&mut cases);
    lookup::add(&mut cases);
    submit::add(&mut cases);
    order::add(&mut cases);
    read_write::add(&mut cases);
    direct::add(&mut cases);
    sync::add(&mut cases);
    kinds::add(&mut cases);
    poll::add(&mut cases);
    capacity::add(&mut cases);
    events::add(&mut cases);
    signals::add(&mut cases);
    cancel::add(&mut cases);
    destroy::add(&mut cases);
    process::add(&mut cases);
    libaio::add(&mut cases);
    scale::add(&mut cases);
    cases.0
}
