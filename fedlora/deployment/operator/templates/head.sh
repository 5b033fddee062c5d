set -eu
umask 077
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
export FLWR_HOME="$here/flwr"
export @{quiet}
