//! Compiles the .proto sources with protox, so that no protoc is needed.

use std::{env, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sources = [
        "proto/geminga/v1/common.proto",
        "proto/geminga/v1/publisher.proto",
        "proto/geminga/v1/subscriber.proto",
        "proto/geminga/v1/discovery.proto",
        "proto/geminga/admin/v1/admin.proto",
        "proto/geminga/internal/v1/segments.proto",
        "proto/geminga/storage/v1/metadata.proto",
        "proto/geminga/storage/v1/entry.proto",
        "proto/geminga/storage/v1/cursor.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(sources, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("geminga_descriptor.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
