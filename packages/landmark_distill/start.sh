#!/bin/sh
# The two published recipes. Usage: sh start.sh swin-tiny|resnet12 [more options of main.py]
#
# Where the images lie and which teacher is asked comes from the environment:
#   TRAIN_LIST, TRAIN_ROOT  lists and their folders, separated by spaces
#   VAL_LIST VAL_ROOT TEST_LIST TEST_ROOT, and maybe REMAP COARSE_MASK FINE_MASK
#   TEACHER                 weights of the Swin-base teacher
#   SAVE_DIR                results (default: runs/landmark_distill)
set -eu
recipe=${1:?"expected swin-tiny or resnet12"}
shift
here=$(dirname "$0")
# shellcheck disable=SC2086 - the lists are words on purpose
exec "${PYTHON:-python}" "$here/main.py" --recipe "$recipe" --multi_gpu \
    --teacher_init_weights "${TEACHER:?"expected the weights of the teacher"}" \
    --train_list ${TRAIN_LIST:?"expected one list or more"} \
    --train_root ${TRAIN_ROOT:?"expected a folder for each list"} \
    --val_list "${VAL_LIST:?}" --val_root "${VAL_ROOT:?}" \
    --test_list "${TEST_LIST:?}" --test_root "${TEST_ROOT:?}" \
    ${REMAP:+--remap "$REMAP"} \
    ${COARSE_MASK:+--coarse_mask "$COARSE_MASK"} ${FINE_MASK:+--fine_mask "$FINE_MASK"} \
    --save_dir "${SAVE_DIR:-runs/landmark_distill}" --resume auto "$@"
