//! Checks a model's properties: the current design in every state within its bounds, a rejected one until a property fails.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::hash::{Hash, Hasher};
use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Model};

/// Far more steps than any of our bounds needs. A model that grows beyond it fails instead of filling the memory.
const MAX_STEPS: usize = 20_000_000;

/// Asserts that a design keeps every property in every state within its bounds, and that the bounds are wide enough for
/// each case that they should include.
pub(crate) fn check<M>(name: &str, model: M)
where
    M: Model + Clone + Send + Sync + 'static,
    M::State: Debug + Clone + PartialEq + Hash + Send + Sync,
    M::Action: Debug + Clone + PartialEq,
{
    let began = Instant::now();
    let checker = model.clone().checker().threads(2).target_state_count(MAX_STEPS);
    let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let (states, steps) = (checker.unique_state_count(), checker.state_count());
    eprintln!("{name}: {states} states, {steps} steps between them, {:.1} s", began.elapsed().as_secs_f64());
    assert!(steps < MAX_STEPS, "{name}: not every state was checked");
    checker.assert_properties();
    assert!(checker.is_done(), "{name}: not every state was checked");
    // A second, independent search detects a checker that stopped early.
    assert_eq!(count_states_depth_first(&model), states, "{name}: the depth-first search finds another number of states");
}

/// Visits every state depth first and returns their number. Asserts that no state leads back to itself: then every
/// behaviour comes to rest, and a property of states at rest holds for every behaviour.
fn count_states_depth_first<M>(model: &M) -> usize
where
    M: Model,
    M::State: Debug + Hash,
{
    // By hash: whether the state is on the current path.
    let mut visited: HashMap<u64, bool> = HashMap::new();
    let mut path = Vec::new();
    let mut next: Vec<M::State> = model.init_states();
    loop {
        if let Some(state) = next.pop() {
            let mut hasher = DefaultHasher::new();
            state.hash(&mut hasher);
            let hash = hasher.finish();
            match visited.get(&hash) {
                Some(true) => panic!("a behaviour returns to {state:?}"),
                Some(false) => {}
                None => {
                    let mut actions = Vec::new();
                    model.actions(&state, &mut actions);
                    visited.insert(hash, true);
                    path.push((hash, state, actions));
                }
            }
        }
        let Some((hash, state, actions)) = path.last_mut() else { return visited.len() };
        match actions.pop() {
            Some(action) => next.extend(model.next_state(state, action)),
            None => {
                visited.insert(*hash, false);
                path.pop();
            }
        }
    }
}

/// Asserts that a design breaks a property, and prints a shortest behaviour that breaks it.
pub(crate) fn refute<M>(name: &str, model: M, property_name: &'static str)
where
    M: Model + Clone + Send + Sync + 'static,
    M::State: Debug + Clone + PartialEq + Hash + Send + Sync,
    M::Action: Debug + Clone + PartialEq,
{
    let is_checked =
        |property: &stateright::Property<M>| property.name == property_name && property.expectation == Expectation::Always;
    assert!(model.properties().iter().any(is_checked), "{name}: the model has no property `{property_name}`");
    let began = Instant::now();
    let mut states = 0;
    let mut find = |depth: usize| {
        let checker = model.clone().checker().target_state_count(MAX_STEPS).target_max_depth(depth);
        let checker = checker.finish_when(HasDiscoveries::AllOf(BTreeSet::from([property_name]))).spawn_bfs().join();
        states = states.max(checker.unique_state_count());
        checker.discovery(property_name).map(|path| path.into_actions())
    };
    let Some(mut actions) = find(usize::MAX) else { panic!("{name}: the design keeps the property: {property_name}") };
    // The checker returns the last discovery before it stops, not the shortest. A path of n steps has depth n + 1, and
    // states at the maximum depth are not visited.
    while let Some(shorter) = find(actions.len() + 1) {
        actions = shorter;
    }
    let seconds = began.elapsed().as_secs_f64();
    eprintln!("{name}: breaks the property: {property_name}: {} steps, {states} states, {seconds:.1} s", actions.len());
    for action in actions {
        eprintln!("    {action:?}");
    }
}
