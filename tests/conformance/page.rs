//! The part of docs/semantics.md that says which rows passed.

use std::{collections::BTreeMap, fmt::Write as _, sync::Mutex};

use crate::{rows::table, run::Row, world::Shape};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/semantics.md");
const BEGIN: &str = "<!-- rows: made by tests/conformance, UPDATE_DOCS=1 writes them -->\n";
const END: &str = "<!-- end of rows -->\n";

/// Both shapes' tests write one file.
static WRITING: Mutex<()> = Mutex::new(());

/// Marks of a row: in the standalone, in the cluster.
type Marks = BTreeMap<String, [String; 2]>;

fn column(shape: Shape) -> usize {
    match shape {
        Shape::Standalone => 0,
        Shape::Cluster => 1,
    }
}

/// The text between the two marks, with what is before and behind.
fn split(page: &str) -> (&str, &str, &str) {
    let (head, rest) = page.split_once(BEGIN).expect("docs/semantics.md has the mark of the rows");
    let (rows, tail) = rest.split_once(END).expect("docs/semantics.md has the end of the rows");
    (head, rows, tail)
}

/// What the page says of each row, by its name.
fn marks(rows: &str) -> Marks {
    let mut marks = Marks::new();
    for line in rows.lines().skip(2) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        if let [_, name, standalone, cluster] = cells[..] {
            marks.insert(name.to_owned(), [standalone.to_owned(), cluster.to_owned()]);
        }
    }
    marks
}

fn not_run() -> [String; 2] {
    ["not run".to_owned(), "not run".to_owned()]
}

fn print(rows: &[Row], marks: &Marks) -> String {
    let mut text =
        "| promise | what is shown | standalone | cluster |\n|---|---|---|---|\n".to_owned();
    for row in rows {
        let [standalone, cluster] = marks.get(row.name).cloned().unwrap_or_else(not_run);
        let _ = writeln!(text, "| {} | {} | {standalone} | {cluster} |", row.promise, row.name);
    }
    text
}

/// Whether this run is to write the page.
pub(crate) fn is_to_be_written() -> bool {
    std::env::var_os("UPDATE_DOCS").is_some()
}

/// The rows' part as it should be after this run, and the page.
fn after(shape: Shape, rows: &[Row], passed: &[bool]) -> (String, String) {
    let page = std::fs::read_to_string(PAGE).expect("docs/semantics.md exists");
    let mut marks = marks(split(&page).1);
    for (row, passed) in rows.iter().zip(passed) {
        let cells = marks.entry(row.name.to_owned()).or_insert_with(not_run);
        (if *passed { "passed" } else { "fails" }).clone_into(&mut cells[column(shape)]);
    }
    (print(rows, &marks), page)
}

/// Writes what passed into the page.
pub(crate) fn write(shape: Shape, rows: &[Row], passed: &[bool]) {
    let _one_at_a_time = WRITING.lock().expect("nobody panics with it");
    let (now, page) = after(shape, rows, passed);
    let (head, _, tail) = split(&page);
    std::fs::write(PAGE, format!("{head}{BEGIN}{now}{END}{tail}")).expect("it can be written");
}

/// Compares what passed with the page.
///
/// # Panics
/// If the page says something else.
pub(crate) fn compare(shape: Shape, rows: &[Row], passed: &[bool]) {
    let (now, page) = after(shape, rows, passed);
    let (_, before, _) = split(&page);
    let differs: Vec<&str> = now.lines().filter(|line| !before.contains(line)).collect();
    assert!(
        differs.is_empty(),
        "docs/semantics.md says something else: run UPDATE_DOCS=1 cargo test --workspace --test conformance\n{differs:#?}"
    );
}

/// The ids of the promises that the page lists: first cells of its tables outside of the rows.
fn promises(page: &str) -> Vec<String> {
    let (head, _, tail) = split(page);
    let lines = head.lines().chain(tail.lines());
    let ids = lines.filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(id, _)| id));
    ids.map(str::to_owned).collect()
}

#[test]
fn the_page_lists_each_row_once_and_every_row_has_a_promise_on_the_page() {
    let page = std::fs::read_to_string(PAGE).expect("docs/semantics.md exists");
    let (_, rows, _) = split(&page);
    let promises = promises(&page);
    let mut names = std::collections::BTreeSet::new();
    for row in table() {
        assert!(names.insert(row.name), "two rows are called {:?}", row.name);
        assert!(!row.name.contains('|'), "{:?} cannot stand in a table", row.name);
        assert!(promises.iter().any(|id| id == row.promise), "no promise `{}`", row.promise);
        if !is_to_be_written() {
            assert!(
                marks(rows).contains_key(row.name),
                "the page lacks {:?}: UPDATE_DOCS=1",
                row.name
            );
        }
    }
    if !is_to_be_written() {
        assert_eq!(
            marks(rows).len(),
            names.len(),
            "the page has rows that are none: UPDATE_DOCS=1"
        );
    }
}
